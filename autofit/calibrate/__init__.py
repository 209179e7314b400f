"""Learns from runs: keeps what was predicted beside what was measured, and fits corrections to it."""

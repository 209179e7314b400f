"""Starts the training that was planned, follows it, and goes on with the next fallback where memory ran out."""

from autofit.launch.launch import Conduct, Outcome, launch

__all__ = ["Conduct", "Outcome", "launch"]

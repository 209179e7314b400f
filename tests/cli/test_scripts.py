"""What `autofit launch` says of a script before anything is started."""

from pathlib import Path

FULL = Path(__file__).resolve().parents[1] / "sources" / "scripts" / "full.py"
READ = ("launch", FULL, "--no-discover", "--seq-len", 4096, "--dry-run", "--precision", "fp32", "--zero", 0)


def test_what_was_read_is_shown_also_where_nothing_fits(autofit):
    """Llama-3.1-8B does not fit two ranks of 8 GB; what the script was taken for stands before the refusal."""
    result = autofit(*READ, "--model", "meta-llama/Llama-3.1-8B", "--gpus", "2xCPU-8G")
    assert result.exit_code == 3
    assert result.stderr.index("Read from the script") < result.stderr.index("does not fit")
    assert "the script was read, not run (--no-discover)" in result.stderr
    assert "4 sequences a device x 2 accumulation steps x 2 devices, read in full.py:" in result.stderr


def test_a_script_without_a_model_is_refused_in_words(autofit):
    """full.py takes its model from the command line, where there is none: --model is asked for."""
    result = autofit(*READ, "--gpus", "2xCPU-8G")
    assert result.exit_code == 2
    assert "does not say which model it trains" in result.stderr
    assert "--model" in result.stderr

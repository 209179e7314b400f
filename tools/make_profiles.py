"""Makes the profiles that are shipped: `python tools/make_profiles.py [MODEL ...]`, with the pinned libraries.

For the models people ask for most, every regime that an unrestricted plan needs on one and on eight bf16 GPUs, on an
fp16 GPU and on two CPU ranks; for some, on one and on eight bf16 GPUs; for the rest of the catalogue, what one bf16 GPU
needs. Seconds for each regime: about an hour for all on two cores.
"""  # noqa: INP001 - a script, not a module

from __future__ import annotations

import os
import sys
import tempfile

from autofit.search.solve import required_regimes
from autofit.sources.hardware import parse_cluster
from autofit.sources.models import model_catalogue, resolve_model
from autofit.sources.profiles import SHIPPED_FOLDER, pack_name, profiles_and_refusals, write_pack
from autofit.spec.job import Job, Model, Restrictions, Workload
from autofit.spec.libraries import installed_versions
from autofit.spec.profile import Regime

POPULAR = (
    "HuggingFaceTB/SmolLM2-135M-Instruct",
    "HuggingFaceTB/SmolLM2-360M",
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    "meta-llama/Llama-3.2-1B",
    "meta-llama/Llama-3.1-8B",
    "meta-llama/Llama-3.1-70B",
    "mistralai/Mistral-7B-v0.1",
    "Qwen/Qwen2.5-0.5B",
    "Qwen/Qwen2.5-7B",
    "meta-llama/Llama-2-7b-hf",
)
OFTEN_SHARDED = (
    "Qwen/Qwen3-4B",
    "Qwen/Qwen3-8B",
    "Qwen/Qwen3-14B",
    "Qwen/Qwen3-32B",
    "Qwen/Qwen3-30B-A3B",
    "Qwen/Qwen2.5-14B",
    "Qwen/Qwen2.5-32B",
    "Qwen/Qwen2.5-72B",
    "google/gemma-2-9b",
    "meta-llama/Llama-3.2-3B",
    "microsoft/phi-4",
    "mistralai/Mistral-7B-v0.3",
    "mistralai/Mixtral-8x7B-v0.1",
)
POPULAR_ON = ("A100-80G", "8xA100-80G", "T4-16G", "2xCPU-8G")
OFTEN_SHARDED_ON = ("A100-80G", "8xA100-80G")
OTHERS_ON = ("A100-80G",)
WORKLOAD = Workload(sequence_tokens=1024, global_batch_sequences=8)
"""The length decides on which side of an attention window a profile holds; longer ones are traced on first use."""


def regimes_of(model: Model, gpus: tuple[str, ...]) -> tuple[Regime, ...]:
    """Return every regime that is needed on any of `gpus`, once."""
    job = Job(model=model, workload=WORKLOAD, restrictions=Restrictions())
    return tuple(dict.fromkeys(regime for each in gpus for regime in required_regimes(job, parse_cluster(each))))


def main() -> None:
    """Trace the models named on the command line, or all; anew, whatever is cached or was shipped before."""
    os.environ["AUTOFIT_CACHE"] = tempfile.mkdtemp(prefix="autofit-profiles-")
    every = dict.fromkeys((*POPULAR, *(entry.id for entry in model_catalogue().models)))
    if not sys.argv[1:]:
        for path in SHIPPED_FOLDER.glob("*.json.xz"):
            path.unlink()
    for name in sys.argv[1:] or every:
        model = resolve_model(name)
        path = SHIPPED_FOLDER / pack_name(model.config, installed_versions())
        path.unlink(missing_ok=True)
        gpus = POPULAR_ON if name in POPULAR else OFTEN_SHARDED_ON if name in OFTEN_SHARDED else OTHERS_ON
        profiles, refused = profiles_and_refusals(
            model, regimes_of(model, gpus), WORKLOAD.sequence_tokens, progress=lambda *_: None
        )
        for refusal in dict.fromkeys(refusal.message.partition("\n")[0] for refusal in refused.values()):
            sys.stdout.write(f"{name}: {refusal}\n")
        if profiles:
            write_pack(path, tuple(profiles.values()))
            sys.stdout.write(f"{name}: {len(profiles)} profiles, {path.stat().st_size / 1000:.0f} kB in {path.name}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()

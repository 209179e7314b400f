"""Which attention a model gets where none is asked for."""

from __future__ import annotations

import pytest

from autofit.errors import InputError
from autofit.options import SearchWish, restrictions
from autofit.search.space import attentions
from autofit.sources.attention import usual_attention
from autofit.sources.models import model_from_config
from autofit.spec.job import Job, Restrictions, Workload

TYPES = ("bert", "bloom", "data2vec-text", "falcon", "gemma2", "gpt_neo", "gpt_oss", "llama", "mixtral", "mpt", "qwen3")


def config_of(model_type):
    """Return as much of a config as says which class is built."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    return {"model_type": model_type, "architectures": [NAMES[model_type]]}


@pytest.mark.parametrize("model_type", TYPES)
def test_it_is_what_the_installed_class_has(model_type):
    """Read from the source without importing it, it is what the imported class says of itself."""
    import transformers

    config = config_of(model_type)
    has_sdpa = getattr(transformers, config["architectures"][0])._supports_sdpa
    assert usual_attention(config) == ("sdpa" if has_sdpa else "eager")


@pytest.mark.parametrize(
    "config", [{"model_type": "no-such"}, {"model_type": "llama", "architectures": ["NoSuchForCausalLM"]}]
)
def test_a_class_that_is_not_found_is_left_to_the_trace(config):
    """Of what transformers does not have nothing is known: a trace then refuses what is not there."""
    assert usual_attention(config) == "sdpa"


def test_what_is_asked_for_goes_before_it():
    """A job without a wish has the model's own; one that asks for sdpa has sdpa, which its trace refuses."""
    model = model_from_config(config_of("gemma2"), name="any", origin="config file", source="any")
    work = Workload(sequence_tokens=8, global_batch_sequences=1)

    def found(wished):
        return attentions(Job(model=model, workload=work, restrictions=restrictions(SearchWish(attention=wished))))

    assert Restrictions().attention == "auto"
    assert found(None) == found(["auto"]) == ("eager",)
    assert found(["sdpa"]) == ("sdpa",)
    assert found(["sdpa", "eager"]) == ("sdpa", "eager")
    with pytest.raises(InputError, match="auto is given beside others"):
        found(["auto", "sdpa"])

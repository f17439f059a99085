"""TRL's trainer with an adaptation plan, on the quick start's task: accuracy on held-out problems, before and after.

hybrid-rl warm-start configs/quickstart.yaml                           # the base policy, once
hybrid-rl rank configs/quickstart.yaml --out plan.json                 # what is trained, and how
python examples/trl_hybrid.py plan.json [STEPS]
"""

import sys
from statistics import fmean

import torch
from datasets import Dataset
from trl import GRPOConfig

from hybrid_rl.config_file import load_config
from hybrid_rl.data import PromptSource, build_prompts, load_rows, load_tokenizer
from rewards.math import accuracy
from trainers.trl_grpo import HybridGRPOTrainer

plan, steps = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 160
config = load_config("configs/quickstart.yaml", [f"steps={steps}"])
tokenizer = load_tokenizer(config)


def problems(name: str, source) -> list:
    rows = load_rows(source, setting=name, columns=config.data.columns)
    return build_prompts(rows, config.data, tokenizer, setting=name)[0]


def right() -> float:
    prompts = tokenizer([p.text for p in held_out], padding=True, padding_side="left", return_tensors="pt")
    prompts = prompts.to(trainer.model.device)
    ids = trainer.model.generate(**prompts, do_sample=False, max_new_tokens=config.sampling.max_completion_length)
    texts = tokenizer.batch_decode(ids[:, prompts.input_ids.shape[1] :], skip_special_tokens=True)
    return fmean(accuracy(texts, [p.columns["answer"] for p in held_out]))


held_out = problems("data.eval", config.data.eval)[: config.data.eval_size]
drawn = PromptSource(problems("data.train", config.data.train), config.seed).take(steps * config.batch.prompts)
args = GRPOConfig(
    output_dir="runs/trl_hybrid",
    learning_rate=config.full.lr,  # of the full weights; that of the adapters is 10 times as high
    lr_scheduler_type="linear",
    warmup_steps=config.learner.warmup_steps,
    max_steps=steps,
    per_device_train_batch_size=config.completions_per_step,
    num_generations=config.batch.num_generations,
    max_completion_length=config.sampling.max_completion_length,
    loss_type="grpo",
    shuffle_dataset=False,  # the problems come in the order of `hybrid-rl train`
    gradient_checkpointing=False,
    bf16=torch.cuda.is_available(),
    save_strategy="no",
    report_to="none",
)
rows = Dataset.from_list([{"prompt": p.text, "answer": p.columns["answer"]} for p in drawn])
trainer = HybridGRPOTrainer(plan=plan, model=config.model.path, reward_funcs=accuracy, args=args, train_dataset=rows)
before, _ = right(), trainer.train()
trainer.save_merged("runs/trl_hybrid/merged")
print(f"held-out accuracy {before:.3f} -> {right():.3f}")

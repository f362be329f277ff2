"""The recipe's `finetune` section as arguments of transformers' Trainer."""

from __future__ import annotations

from pathlib import Path

from transformers import TrainingArguments

from sqft.recipe.sections import Finetune


def training_arguments(section: Finetune, checkpoints: Path, seed: int, device: str) -> TrainingArguments:
    """Translate a `finetune` section; checkpoints go to the folder `checkpoints`."""
    return TrainingArguments(
        output_dir=str(checkpoints),
        num_train_epochs=section.epochs,
        max_steps=section.steps or -1,
        per_device_train_batch_size=section.batch_size,
        gradient_accumulation_steps=section.gradient_accumulation,
        learning_rate=section.learning_rate,
        lr_scheduler_type=section.schedule,
        warmup_steps=section.warmup_ratio or section.warmup_steps,
        weight_decay=section.weight_decay,
        adam_beta1=section.adam_beta1,
        adam_beta2=section.adam_beta2,
        adam_epsilon=section.adam_epsilon,
        max_grad_norm=section.max_grad_norm,
        bf16=section.precision == "bfloat16",
        fp16=section.precision == "float16",
        use_cpu=device == "cpu",
        seed=seed,
        data_seed=seed,
        optim=section.optimizer,
        remove_unused_columns=False,
        label_names=["labels"],
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to=list(section.report_to) or "none",
        eval_strategy="steps" if section.validation else "no",
        eval_steps=section.evaluate_every,
        disable_tqdm=True,
        save_strategy="steps",
        save_steps=section.save_every,
        save_total_limit=2,  # the newest may be cut short while it is written; the one before it is complete
        dataloader_pin_memory=False,
        ddp_find_unused_parameters=False,  # the part of a delta beyond the rank in use has a gradient of 0, not none
    )

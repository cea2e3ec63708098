"""Rules between numbers of the recipe that no single field can state. Plain numbers in, sentences out: no torch."""

from __future__ import annotations


def schedule_problems(
    *,
    lr: float,
    min_lr: float,
    train_iters: int,
    warmup_iters: int,
    decay_style: str,
    decay_iters: int | None = None,
    wsd_decay_iters: int | None = None,
) -> list[str]:
    """What is wrong with a learning-rate schedule; empty where nothing is.

    Warmup may end on the last step (a recipe cut short to its warmup still runs), but not after it: the learning rate
    of the recipe would never be reached. `decay_iters` may lie beyond `train_iters`.
    """
    problems = []
    end_name, end = ("lr_decay_iters", decay_iters) if decay_iters is not None else ("train_iters", train_iters)
    if min_lr > lr:
        problems.append(f"optimizer.min_lr {min_lr:g} is above optimizer.lr {lr:g}: the schedule decays from lr to min_lr; lower min_lr")
    if warmup_iters > end:
        problems.append(
            f"optimizer.lr_warmup_iters {warmup_iters} is above {end_name} {end}: warmup would never end; set it to at most {end}"
        )
    if wsd_decay_iters is None:
        return problems
    if decay_style != "WSD":
        problems.append(
            f"optimizer.lr_wsd_decay_iters {wsd_decay_iters} has no meaning with lr_decay_style {decay_style}: drop it, or use WSD"
        )
    elif warmup_iters <= end and wsd_decay_iters > end - warmup_iters:
        problems.append(
            f"optimizer.lr_wsd_decay_iters {wsd_decay_iters} does not fit between warmup and the end: {end_name} {end} - "
            f"lr_warmup_iters {warmup_iters} = {end - warmup_iters} is the most"
        )
    return problems

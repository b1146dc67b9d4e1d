"""Train a CLIP model from a recipe:

    deepspeed [--hostfile HOSTFILE] cmpt/train.py RECIPE [key=value ...]

or with `torchrun`, or with plain `python` as a single process. A second start with the same run folder resumes.
This is the only file that knows all parts.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

# Run as a script, Python puts this folder, not the project, on the path.
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

# A packed batch has another number of tokens every step; oneDNN would keep code for 1,024 shapes: gigabytes.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")

import torch

from cmpt.batch import ImageTextBatch
from cmpt.data.loader import Loader, batch_digest, longest_wait_s
from cmpt.data.places import Stall
from cmpt.data.shards import Ranks, open_sources
from cmpt.data.streams import LoaderState
from cmpt.data.tokenizer import Tokenizer, open_tokenizer, with_vocabulary
from cmpt.data.validate import DataError
from cmpt.dist import process_group, traffic
from cmpt.dist.process_group import gather_objects, sum_over_ranks
from cmpt.engine.build import Trained, build
from cmpt.engine.checkpoint import Checkpoints, TrainState
from cmpt.engine.counts import count_step
from cmpt.engine.dry_run import OutOfMemoryError, dry_run, largest_batch
from cmpt.engine.embedder import patch_embedder
from cmpt.engine.equal_weights import unequal_weights
from cmpt.engine.feed import Feed
from cmpt.engine.manifest import CheckpointError
from cmpt.engine.plan import Plan
from cmpt.engine.run_folder import conflict, left_out, prepare, run_folder
from cmpt.engine.signals import StopSignals
from cmpt.engine.step import StepResult, drop_step, find_gradient, take_step
from cmpt.engine.store import Store
from cmpt.engine.traffic import count_deepspeed
from cmpt.evaluations import Evaluations
from cmpt.masking.fixed import score_function
from cmpt.masking.strategies import Masked, MaskStage
from cmpt.models.clip import CLIP
from cmpt.models.flops import peak_flops
from cmpt.models.open_clip_format import FormatError
from cmpt.models.pretrained import load_pretrained
from cmpt.monitor.guard import LossGuard, TrainingDivergedError
from cmpt.monitor.meters import Meters, peak_memory_bytes
from cmpt.monitor.monitor import Monitor
from cmpt.monitor.timings import Timings
from cmpt.monitor.watchdog import Watchdog, WatchdogError
from cmpt.ops.attention import attention_backend
from cmpt.recipe import RecipeError, check_recipe, load_recipe, phases, recipe_fingerprint
from cmpt.recipe.schema import Recipe
from cmpt.remedies import Remedies

_QUIET_INDEXING_S = 5.0
_SAME_ON_ALL_RANKS = (FormatError, RecipeError, TrainingDivergedError, WatchdogError)
_USER_ERRORS = (*_SAME_ON_ALL_RANKS, CheckpointError, DataError, OutOfMemoryError)
_LET_THE_FIRST_RANK_SPEAK_S = 2.0
USER_ERROR = 2


def main(arguments: Sequence[str] | None = None) -> int:
    recipe = checked_recipe(arguments)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    # The other ranks wait in a collective for one whose data do not come.
    rank, world_size, device = process_group.start(timeout_minutes=10 + longest_wait_s(recipe.data) / 60)
    try:
        return train(recipe, rank, world_size, device)
    except _USER_ERRORS as error:
        # What a user can mend is said in a line; everything else keeps its traceback.
        if rank and isinstance(error, _SAME_ON_ALL_RANKS):
            time.sleep(_LET_THE_FIRST_RANK_SPEAK_S)
        else:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return USER_ERROR
    finally:
        process_group.stop()


def checked_recipe(arguments: Sequence[str] | None) -> Recipe:
    """The recipe that the command line names; with any fault, one clear line for each and SystemExit."""
    parser = argparse.ArgumentParser(
        prog="cmpt/train.py", description="Train a CLIP model from a recipe; a second start resumes."
    )
    parser.add_argument("recipe", help="a YAML file, e.g. recipes/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values to override, e.g. run.name=trial")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher
    parsed = parser.parse_args(arguments)
    if parsed.local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(parsed.local_rank))
    try:
        loaded = load_recipe(parsed.recipe, parsed.overrides)
        faults = check_recipe(loaded.recipe, int(os.environ.get("WORLD_SIZE", "1")), loaded.origins)
        faults = faults or [fault for fault in [conflict(loaded.recipe)] if fault]
    except RecipeError as error:
        faults = error.faults
    if faults:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print("\n".join(f"error: {fault}" for fault in faults), file=sys.stderr, flush=True)
        else:  # the launcher ends all ranks when the first one fails: let the one that speaks be first
            time.sleep(_LET_THE_FIRST_RANK_SPEAK_S)
        raise SystemExit(USER_ERROR)
    return loaded.recipe


def train(recipe: Recipe, rank: int, world_size: int, device: torch.device) -> int:
    """Build every part, run the recipe to its end or to where something ends it early. Returns the exit code."""
    primary = rank == 0
    folder, patience_s = run_folder(recipe), longest_wait_s(recipe.data)
    tokenizer = open_tokenizer(recipe.tokenizer, recipe.model.context_length)
    recipe = with_vocabulary(recipe, tokenizer)
    loader = build_loader(recipe, tokenizer, rank, world_size, device)
    evaluations = Evaluations(recipe, tokenizer, rank, world_size, device)
    plan = Plan(recipe, loader.samples_per_epoch)
    for planned in plan.phases:
        if planned.phase.masking.scores:
            score_function(planned.phase.masking.scores)  # what cannot be imported ends the run now, not in its phase
    clip = CLIP(recipe.model, recipe.image.size, recipe.run.seed)
    starts = recipe.run.overwrite or not any((folder / "checkpoints").glob("step_*"))
    if recipe.model.init_from and starts:
        load_pretrained(clip, recipe, tokenizer.eot_id)
    parameters = sum(parameter.numel() for parameter in clip.parameters())
    trained = build(clip, recipe.engine, recipe.optimizer, world_size, device)
    count_deepspeed()
    store = checkpoint_store(recipe)
    if primary:
        if recipe.run.overwrite:
            store.forget_copies()
        prepare(recipe, world_size, [shard.url for source in loader.shards for shard in source if shard.out_of_reach])
    process_group.barrier()
    checkpoints = Checkpoints(store)
    fingerprint = recipe_fingerprint(recipe)
    state = checkpoints.load_newest(trained) or TrainState(recipe=fingerprint, data=loader.data_fingerprint)
    if state.recipe != fingerprint:
        raise CheckpointError("run.name: its newest checkpoint, or a copy, is of another recipe; choose another name")
    if state.data != loader.data_fingerprint:
        changed = "data.train: shards, or the word counts of text_masking.frequencies, are not those of the checkpoint"
        raise CheckpointError(f"{changed}; start a new run")
    position = LoaderState.from_json(state.loader) if state.loader else loader.initial_state()
    guard = LossGuard(recipe.guard, state.guard)
    peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    patch_size, micro = recipe.model.patch_size, recipe.engine.micro_batch_size
    assert patch_size is not None
    meters = Meters(recipe.engine.batch_size, peak and peak * world_size)

    with (
        Monitor(folder, recipe.run.name, plan.total_steps, state.step, primary) as monitor,
        Timings(folder, recipe.run.timings, rank, device) as timings,
        Watchdog(folder, recipe.guard.watchdog_seconds) as watch,
        StopSignals(folder / "stop" if primary else None) as signals,
    ):
        remedies = Remedies(recipe, state, trained, checkpoints, guard, monitor)
        checkpoints.before_publishing = monitor.sync
        for fault in (*checkpoints.faults, *evaluations.left_out):
            monitor.event("warning", state.step, text=fault)
        backend = attention_backend(device.type, clip.compute_dtype)
        monitor.event("model", state.step, parameters=parameters, attention=backend, init_from=recipe.model.init_from)
        if recipe.guard.dry_run and plan.remaining(state.step):
            watch.at("dry run", state.step, patient=True)
            checkpoints.reserve(trained)  # what the first checkpoint will need in host memory
            rehearse(trained, recipe, plan, state.step, world_size, monitor)
        if state.step == 0:
            state.skip(loader.shard_faults)
            monitor.skips(0, loader.shard_faults)
        stop_signal = 0
        for planned in plan.remaining(state.step):
            phase = planned.phase
            embed = patch_embedder(trained, phase.masking.embedding_positions)
            mask = MaskStage(
                phase.masking, phase.image, patch_size, recipe.run.seed, sum_over_ranks, embed, clip.compute_dtype
            )
            if state.step > planned.first_step:
                mask.load_state(state.masking)
            guard.begin(phase.name)
            watch.begin_phase()
            watch.at("data", state.step, patient=True)
            stalled = partial(report_stall, monitor, state, rank)
            with closing(loader.batches(position, phase.image, phase.text_masking, stalled)) as batches:

                def came(_: int) -> None:  # a batch that is looked ahead at is masked within the step before it
                    watch.at("mask", state.step)

                feed = Feed(meters.waiting(batches), mask, planned, state.step, device, came)
                for batch, position, masked in feed:
                    traffic.take()  # what evaluations moved is no step's
                    received = signals.received
                    part = checkpoints.progress()
                    counts = count_step(recipe.model, masked, batch, recipe.engine, received, part)
                    checkpoints.settle(counts.parts_written, counts.parts_failed)
                    mask.advance(counts.mask_ratio)
                    watch.at("data ahead", state.step, least_s=patience_s)
                    feed.look_ahead()
                    watch.at("gradient", state.step)
                    valid_B = batch.valid_B if counts.holes else None
                    result = find_gradient(trained, masked.patches, batch.text, valid_B, recipe.loss, micro)
                    step, stop_signal = state.step + 1, counts.stop_signal
                    saves, ends = plan.saves(step), bool(stop_signal) or plan.ends(step)
                    unequal = refusal = None
                    if recipe.guard.weights_every and (saves or ends or plan.compares_weights(step)):
                        watch.at("comparison of weights", state.step, patient=True)
                        unequal = unequal_weights(trained)
                    watch.at("optimizer", state.step)
                    lr, logs = planned.learning_rate(step), plan.logs(step)
                    if not (unequal or result.overflowed):
                        refusal = guard.judge(result.loss, result.gradient_norms["total"])
                    if unequal or refusal or result.overflowed:
                        drop_step(trained, result)
                    else:
                        take_step(trained, result, lr, recipe.optimizer.clip_norm)
                    watch.at("records", state.step, least_s=patience_s)
                    state.advance(mask.state(), counts.rejections)
                    state.image_size = phase.image.size
                    moved = traffic.take()
                    meters.add(counts, moved)
                    timings.add(state.step, counts, moved)
                    monitor.skips(state.step, counts.rejections)
                    if refusal:
                        watch.at("refused batch", state.step, patient=True)
                        remedies.refused(refusal, batch, result)
                    if unequal:
                        watch.at("unequal weights", state.step, patient=True)
                        remedies.unequal_weights(unequal)
                    if logs:
                        monitor.log(metrics(state, phase.name, lr, masked, result, guard, batch, loader, meters))
                    if evaluations and plan.evaluates(state.step):
                        watch.at("evaluation", state.step, patient=True)
                        gets_on = partial(watch.at, "evaluation", state.step, patient=True)
                        with meters.pause():
                            evaluations.run(trained, monitor, state.step, batch, masked, gets_on)
                    if saves or ends:
                        watch.at("checkpoint", state.step, patient=True)
                        state.loader = LoaderState.merge(gather_objects(position)).to_json()
                        state.guard = guard.state()
                        meters.stalled(checkpoints.save(trained, state, last=ends))
                    report_checkpoints(checkpoints, monitor, meters)
                    if ends:
                        break
                    watch.at("data", state.step, least_s=patience_s)
            if stop_signal or plan.ends(state.step):
                break
        watch.at("last checkpoint", state.step, patient=True)
        try:
            checkpoints.finish()
        finally:
            report_checkpoints(checkpoints, monitor, meters)
        if primary:
            try:
                from cmpt.monitor.report import write_report  # matplotlib is a fifth of the start's imports

                write_report(folder)
            except OSError as error:
                monitor.event("warning", state.step, text=f"report.html could not be written: {error}")
    return 128 + stop_signal if stop_signal else 0


def checkpoint_store(recipe: Recipe) -> Store:
    run, copies = recipe.run, recipe.run.copy_checkpoints_to
    second = Path(copies).expanduser() / run.name if copies else None
    return Store(run_folder(recipe) / "checkpoints", run.keep_checkpoints, run.keep_checkpoints_hours, second)


def rehearse(trained: Trained, recipe: Recipe, plan: Plan, step: int, world_size: int, monitor: Monitor) -> None:
    """The dry run. It changes nothing that training or the logged peak memory sees."""
    phases = [planned.phase for planned in plan.remaining(step)]
    largest = largest_batch(recipe, phases, recipe.engine.batch_size // world_size)
    seconds = dry_run(trained, recipe, largest)
    monitor.event("dry_run", step, largest=str(largest), seconds=seconds, peak_memory_bytes=peak_memory_bytes())
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def report_checkpoints(checkpoints: Checkpoints, monitor: Monitor, meters: Meters) -> None:
    """Tell what has become of checkpoints since the last step; on rank 0, the others know nothing."""
    for report in checkpoints.taken_reports():
        if report.path is not None:
            meters.checkpoint_bytes_per_s = report.bytes / report.write_s
            cost = {"bytes": report.bytes, "write_s": report.write_s, "stall_s": report.stall_s}
            monitor.checkpoint(report.step, report.path, **cost)
        if report.fault:
            monitor.event("warning", report.step, text=report.fault)


def report_stall(monitor: Monitor, state: TrainState, rank: int, stall: Stall) -> None:
    text = f"rank {rank} {stall}"
    monitor.event("warning", state.step, text=text, **stall._asdict())
    if rank:  # only the first one has events
        print(text, file=sys.stderr, flush=True)


def build_loader(
    recipe: Recipe, tokenizer: Tokenizer, rank: int, world_size: int, device: torch.device | None = None
) -> Loader:
    quiet_until = time.monotonic() + _QUIET_INDEXING_S

    def indexed(source: str, done: int, count: int) -> None:
        if rank == 0 and (done == count or time.monotonic() > quiet_until):
            print(f"{source}: indexed {done:,} of {count:,} shards", file=sys.stderr, flush=True)

    loader = Loader(
        recipe.data,
        recipe.image,
        shards=open_sources(recipe.data, Ranks(rank, world_size, gather_objects), indexed, left_out(recipe)),
        tokenizer=tokenizer,
        context_length=recipe.model.context_length,
        seed=recipe.run.seed,
        batch_size=recipe.engine.batch_size,
        rank=rank,
        world_size=world_size,
        text_masking=recipe.text_masking,
        decode=recipe.decode,
        device=device,
    )
    for phase in phases(recipe) if recipe.phases else []:
        loader.text_mask(phase.text_masking)  # a broken table ends the run now, not when its phase begins
    return loader


def metrics(
    state: TrainState,
    phase: str,
    lr: float,
    masked: Masked,
    result: StepResult,
    guard: LossGuard,
    batch: ImageTextBatch,
    loader: Loader,
    meters: Meters,
) -> dict[str, Any]:
    """One row of metrics.jsonl; every rank calls it. Loss and threshold are this step's, rates since the last row."""
    digests = [digest for part in gather_objects(batch.stream_digests) for digest in part]
    norms = result.gradient_norms
    samples_seen = state.step * meters.global_batch
    return {
        "step": state.step,
        "samples_seen": samples_seen,
        "epoch": samples_seen / loader.samples_per_epoch,
        "phase": phase,
        "loss": result.loss,
        "lr": lr,
        "logit_scale": result.logit_scale.item(),
        "logit_bias": None if result.logit_bias is None else result.logit_bias.item(),
        "grad_norm": norms["total"],
        "grad_norm_image": norms["visual"],
        "grad_norm_text": norms["text"],
        "mask_threshold": masked.threshold,
        "skipped_samples": sum(state.skipped.values()),
        "refused_batches": guard.refused,
        "loss_scale": result.loss_scale,
        "batch_digest": batch_digest(digests),
        **meters.row(),
    }


if __name__ == "__main__":
    sys.exit(main())

"""Checkpoints: save, resume, and what keeps an output folder whole.

    output_dir/checkpoint-STEP          a plain save_pretrained folder
    output_dir/checkpoint-STEP-state    sharded weights and optimiser state (DCP), to resume from on
                                        any number of ranks

Whenever a run is killed, a folder with one of these names is complete: folders are written under a
name that starts with a dot and then renamed, and unfinished ones are removed at the next start.
Both folders hold safetensors: nothing is unpickled. All ranks call `save` and `resume` together.
"""

import ctypes
import fcntl
import gc
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)

import data
import model as modeling

MUST_AGREE = (  # between a run and its resumption, or records and audit would mix two runs
    *("algo", "stages", "seed", "eval_fraction", "train_batch_size", "num_generations"),
    *("max_prompt_length", "max_completion_length", "generation_batches", "alignment", "overlong"),
    *("lora_rank", "split", "preference", "train_fraction", "allow_thinking", "srft_variant"),
    *("warmup", "warmup_epochs", "preference_epochs"),  # where stages and iterations begin
)
STATE_FILE_BYTES = 2**30  # of whole tensors per file of checkpoint-STEP-state: bounds memory
TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)  # adapters without their base


def save(
    out: Path, step: int, model, optimizer, tokenizer, limit: int = 0, texts: dict | None = None
) -> None:
    """Write checkpoint-STEP, then checkpoint-STEP-state; keep the last `limit`, 0 all of them.

    texts  of further files in checkpoint-STEP
    """
    path = out / f"checkpoint-{step}"
    modeling.save(model, tokenizer, path, texts=texts)
    save_state(model, optimizer, state_of(path))
    _trim_memory()
    if dist.get_rank() == 0 and limit:
        remove(out, saved_steps(out)[:-limit])


def resume(out: Path, where: str, model, optimizer) -> int:
    """Load weights and optimiser; return their step, 0 if there is nothing to resume.

    where  --resume_from_checkpoint: empty, latest, or a folder checkpoint-STEP
    Checkpoints of later steps in `out` are deleted. Data and seeds follow from the step.
    """
    found = [saved_steps(out)]
    dist.broadcast_object_list(found)  # all ranks must see the folder alike
    steps = found[0]
    if not where or (where == "latest" and not steps):
        return 0  # also the first start of a job that always passes latest
    folder = out / f"checkpoint-{steps[-1]}" if where == "latest" else Path(where)
    load_state(model, optimizer, state_of(folder))
    first = int(folder.name.removeprefix("checkpoint-"))
    later = [step for step in steps if step > first]
    if dist.get_rank() == 0 and later:
        print(f"resuming after step {first}: checkpoints of later steps {later} are deleted")
        remove(out, later)
    return first


@contextmanager
def on_signals(note: Callable) -> Iterator[None]:
    """Within, SIGTERM and Ctrl-C only call note(number, frame): a loop stops where it can save."""
    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def state_of(folder: Path) -> Path:
    """The folder that holds the optimiser state of a checkpoint."""
    return folder.with_name(folder.name + "-state")


def saved_steps(out: Path) -> list[int]:
    """Steps of the checkpoints in `out` that have both folders, ascending."""
    states = out.glob("checkpoint-*-state")
    steps = (path.name.split("-")[1] for path in states)
    return sorted(int(step) for step in steps if (out / f"checkpoint-{step}").is_dir())


def remove(out: Path, steps: list[int]) -> None:
    """Delete the checkpoints of these steps; `clean` removes what a kill in between leaves."""
    for step in steps:
        for name in (f"checkpoint-{step}", f"checkpoint-{step}-state"):
            (out / name).rename(out / f".{name}.old")
            shutil.rmtree(out / f".{name}.old", ignore_errors=True)


def save_state(model, optimizer, path: Path) -> None:
    """Write weights and moments as sharded safetensors; the folder appears when complete."""
    state = _tensors(model, *get_state_dict(model, optimizer, options=TRAINED))
    files, filled = {}, 0
    for name, tensor in state.items():
        filled += tensor.nbytes
        files[name] = 1 + filled // STATE_FILE_BYTES
    files = {name: 1 + sorted({*files.values()}).index(file) for name, file in files.items()}
    temporary = path.with_name(f".{path.name}.incomplete")
    if dist.get_rank() == 0:  # the others write only when rank 0 has planned the save
        shutil.rmtree(temporary, ignore_errors=True)
    writer = HuggingFaceStorageWriter(
        str(temporary), fqn_to_index_mapping=files, save_distributed=True
    )
    with modeling.whole_or_nothing(temporary, filled):
        dcp.save(state, storage_writer=writer)
    if dist.get_rank() == 0:
        modeling.replace_folder(path, temporary)
    dist.barrier()


def load_state(model, optimizer, path: Path) -> None:
    """Read what `save_state` wrote, on any number of ranks; ValueError for another model."""
    weights, moments = get_state_dict(model, optimizer, options=TRAINED)
    try:
        reader = HuggingFaceStorageReader(str(path))
        dcp.load(_tensors(model, weights, moments), storage_reader=reader)  # in place
    except dcp.CheckpointException as error:
        cause = str(error).strip().splitlines()[-1]  # below DCP's nested tracebacks
        raise ValueError(
            f"{path} does not hold the state of this model ({cause}): choose another checkpoint"
        ) from error
    set_state_dict(
        model,
        optimizer,
        model_state_dict=weights,
        optim_state_dict=moments,
        options=TRAINED,
    )


def _tensors(model, weights: dict, moments: dict) -> dict[str, Tensor]:
    """Weights and moments by name, each tensor once, still sharded."""
    once = {name for name, _ in model.named_parameters()}  # tied weights have two names
    found = {f"model.{name}": weights[name] for name in weights if name in once}
    for name, own in moments["state"].items():
        found |= {f"optimizer.{name}.{key}": tensor for key, tensor in own.items()}
    return found


# ------------------------------------------------------------------------------- the output folder


def continued(out: Path, where: str) -> Path | None:
    """The folder of the run that a start into `out` goes on with; None: it begins anew.

    where  --resume_from_checkpoint. A run without a checkpoint counts if iTool has searched in it.
    """
    folder = out if where in ("", "latest") else Path(where).parent
    begun = saved_steps(folder) or any(data.read_jsonl(folder / "searches.jsonl", growing=True))
    return folder if where and begun else None


def of_stages(where: str, out: Path, first: str) -> tuple[str, str]:
    """--resume_from_checkpoint of both stages of a run into `out`, the first in its folder `first`.

    ValueError for a checkpoint that is in neither stage's folder.
    """
    if where in ("", "latest"):
        return where, where
    folder = Path(where).resolve().parent
    if folder == out.resolve():
        return "latest", where
    if folder.name == first:
        return where, ""
    raise ValueError(
        f"--resume_from_checkpoint {where}: give a checkpoint in --output_dir {out}, or one of a "
        f"first stage, in a folder named {first}; to start from its model, --model_name_or_path"
    )


def refuse_earlier_run(settings: dict) -> list[str]:
    """ValueError if a start would overwrite, or mix with, a run that it does not resume.

    settings  every knob, as in the first line of metrics.jsonl
    Returns the other settings that differ from those of the resumed run.
    """
    out, where = Path(settings["output_dir"]), settings["resume_from_checkpoint"]
    steps = saved_steps(out)
    if where not in ("", "latest"):
        folder = Path(where)
        is_step = folder.name.removeprefix("checkpoint-").isdigit()
        if not (is_step and state_of(folder).is_dir()):
            raise ValueError(
                f"--resume_from_checkpoint {where} is no checkpoint-STEP with a folder "
                f"{state_of(folder)} beside it; take latest, or one of the steps "
                f"{saved_steps(folder.parent)} in {folder.parent}"
            )
    own = where == "latest" or (where and Path(where).resolve().parent == out.resolve())
    if steps and not own:
        raise ValueError(
            f"--output_dir {out} holds a run's checkpoints of steps {steps}: resume it with "
            "--resume_from_checkpoint latest; to start over take another folder, or delete this one"
        )
    if not (folder := continued(out, where)):
        return []
    earlier = next(data.read_jsonl(folder / "metrics.jsonl", growing=True), {})
    changed = {
        name: f"--{name} {earlier[name]} -> {value}"
        for name, value in settings.items()
        if earlier.get(name, value) != value and name != "resume_from_checkpoint"
    }
    if wrong := [text for name, text in changed.items() if name in MUST_AGREE]:
        raise ValueError(
            f"{folder} holds a run with other settings ({', '.join(wrong)}): resume it "
            "with its own, or take another folder"
        )
    return list(changed.values())


def refuse_changed(out: Path, where: str, digests: dict[str, str]) -> None:
    """ValueError where the run that is `continued` has read other data, reward or prompts.

    digests  flag -> what was read, as in the first line of metrics.jsonl; of --model_name_or_path
             what its chat template and tokenizer make of a prompt
    """
    if not (folder := continued(out, where)):
        return
    earlier = next(data.read_jsonl(folder / "metrics.jsonl", growing=True), {}).get("digests")
    if not earlier:
        return
    changed = [
        f"--{name}: {earlier.get(name, 'none')} -> {digests.get(name, 'none')}"
        for name in {**earlier, **digests}
        if earlier.get(name) != digests.get(name)
    ]
    if changed:
        steps = saved_steps(folder)
        model = f" with --model_name_or_path {folder}/checkpoint-{steps[-1]}" if steps else ""
        raise ValueError(
            f"what the run in {folder} reads has changed since its start ({'; '.join(changed)}): "
            f"put it back to resume. To use the new one, start in another --output_dir{model}"
        )


def lock(out: Path):
    """An open file, locked until this process ends; ValueError if another run holds the lock."""
    file = open(out / ".lock", "w")  # noqa: SIM115 - open as long as the run
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(
            f"another run writes into --output_dir {out}: end it, or choose another"
        ) from None
    return file


def clean(out: Path) -> None:
    """Remove what a kill left unfinished; restore a folder whose successor was not yet renamed."""
    for old in out.glob(".checkpoint-*.old"):
        path = out / old.name[1 : -len(".old")]
        if path.name.endswith("best") and not path.exists():
            old.rename(path)
    for path in (*out.glob(".checkpoint-*.incomplete"), *out.glob(".checkpoint-*.old")):
        shutil.rmtree(path)
    for state in out.glob("checkpoint-*-state"):
        if not (out / state.name.removesuffix("-state")).exists():
            shutil.rmtree(state)


def check_shared(out: Path) -> None:
    """ValueError unless all ranks see rank 0's files, since each writes a part of a checkpoint."""
    token = out / ".shared"
    if dist.get_rank() == 0:
        token.write_text("all ranks must see this file\n")
    dist.barrier()
    for _ in range(50):  # a network file system may need some seconds
        seen = token.exists()
        if seen:
            break
        time.sleep(0.1)
    views = [None] * dist.get_world_size()
    dist.all_gather_object(views, seen)
    if dist.get_rank() == 0:
        token.unlink()
    if not all(views):
        raise ValueError(
            f"--output_dir {out}: {views.count(False)} of {len(views)} ranks do not see the files "
            "of rank 0; choose a folder on a file system that all nodes share"
        )


def _trim_memory() -> None:
    """Return freed memory to the system: glibc would keep it in pieces, and a long run grow."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc only
    if trim:
        trim(0)

"""Whole jobs of train.py for the tests of trust: started in a second each, with a fault where one is wanted.

job = Job(argv, log, ranks=2, fault=Fault("loss", rank=1, call=2, act="kill"))    job.wait(), job.kill()

A server process imports torch and train once; each job is a fork of it with a process group and a log of its own.
`ranks=0` is `python train.py`, else torchrun's agent (elastic_launch) with so many forked workers. The same fault
under a real torchrun:

    torchrun --nproc_per_node=2 tests/jobs.py STAGE RANK CALL ACT FLAG --algo toolupt ...
"""

import multiprocessing
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
PATIENCE = 900  # seconds after which a job hangs
PRELOAD = [
    "jobs",
    "train",
    "frozen",
    "transformers.models.qwen2.modeling_qwen2",
]


@dataclass(frozen=True)
class Fault:
    """What goes wrong: call number `call` (from 1) of a stage's function on one rank does `act`, once per `flag`."""

    stage: str  # a key of stages()
    rank: int
    call: int
    act: str  # "raise" | "oom" | "kill" | "SIGTERM" | "SIGINT"
    flag: str = ""  # file that marks a fault that has happened; empty: it happens at every start

    def arm(self) -> None:
        """Wrap the stage's function in this process."""
        owner, name = stages()[self.stage]
        real, calls = getattr(owner, name), []

        def faulty(*arguments, **options):
            calls.append(name)
            if len(calls) == self.call and int(os.environ.get("RANK", "0")) == self.rank:
                self.happen()
            return real(*arguments, **options)

        setattr(owner, name, faulty)

    def happen(self) -> None:
        import torch

        if self.flag:
            if os.path.exists(self.flag):
                return
            open(self.flag, "w").close()
        if self.act == "raise":
            raise RuntimeError(f"injected into {self.stage}")
        if self.act == "oom":
            raise torch.OutOfMemoryError(f"injected into {self.stage}")
        os.kill(os.getpid(), signal.SIGKILL if self.act == "kill" else signal.Signals[self.act])


def stages() -> dict[str, tuple]:
    """The seven stages of run_rl, its save, SFT's loss, iTool's phases, and the function of each that a fault goes into."""
    import itool
    import model
    import simpo
    import spo
    import train
    from methods import FgDapoStar, Rollouts
    from run import Run

    return {
        "sample": (Run, "batch"),
        "roll out": (train, "roll_out"),
        "reward": (train, "score"),
        "advantage": (FgDapoStar, "advantages"),
        "loss": (Rollouts, "loss"),
        "optimiser": (Run, "optimizer_step"),
        "sync": (train, "sync"),
        "save": (model, "replace_folder"),  # twice a checkpoint: all is written, nothing renamed
        "sft loss": (spo, "sft_loss"),
        "perplexity": (simpo, "perplexity"),
        "search": (itool.Searcher, "propose"),
        "preference": (itool, "preference_gradient"),
    }


class Job:
    """A running job; `log` gets all it prints."""

    def __init__(self, argv, log: Path, *, ranks: int = 0, fault: Fault | None = None, **options):
        """argv: a command line, or several that run one after the other in the same processes.

        options: nodes and endpoint of torchrun.
        """
        os.environ["OMP_NUM_THREADS"] = "1"  # of the server too: it starts with the first job
        os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), str(HERE.parent)])
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self.log, self.start = log, time.monotonic()
        lines = argv if isinstance(argv[0], list) else [argv]
        arguments = ([list(map(str, line)) for line in lines], str(log), ranks, fault, options)
        self.process = context.Process(target=_job, args=arguments)
        self.process.start()

    def wait(self) -> int:
        """The exit code, of a signal minus its number; nothing of the job is left afterwards."""
        self.process.join(PATIENCE)
        hung = self.process.is_alive()
        left = self.members()
        self.kill()
        assert not hung, f"the job hung for {PATIENCE} s:\n{self.text()[-3000:]}"
        assert not left, f"orphans {left}"
        return self.process.exitcode

    def send(self, number: int) -> None:
        """Signal the job's first process, as a scheduler does."""
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        """SIGKILL all its processes."""
        for pid in self.members():
            os.kill(pid, signal.SIGKILL)
        self.process.join()

    def members(self) -> list[int]:
        """Living processes of the job's session."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == self.process.pid and fields[0] not in "ZX":
                found.append(int(stat.parent.name))
        return found

    def text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""


def _job(argv, log, ranks, fault, options):
    """In the forked process."""
    os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(
            number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        )
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
    for name in [name for name in os.environ if "RANK" in name or name.startswith("MASTER_")]:
        del os.environ[name]
    if ranks == 0:
        return _worker(argv, fault)
    return _torchrun(argv, ranks, fault, **options)


def _worker(argv, fault):
    import torch.distributed as dist

    import train
    from start import init_distributed
    from tools import show

    if fault:
        fault.arm()
    show.report = lambda out, tokenizer: out  # a second of each job, tested elsewhere
    if len(argv) == 1:
        train.main(argv[0])
        return dist.destroy_process_group()
    init_distributed()
    engine = None
    for line in argv:
        engine = train.train(*train.parse_args(line), engine).engine
    engine.close()
    dist.destroy_process_group()


def _torchrun(argv, ranks, fault, nodes=1, endpoint="localhost:0"):
    """What torchrun does, but its workers are forked."""
    from torch.distributed.elastic.multiprocessing.errors import record
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=nodes,
        max_nodes=nodes,
        nproc_per_node=ranks,
        run_id="test",
        rdzv_backend="c10d",
        rdzv_endpoint=endpoint,
        max_restarts=0,  # a second fork, from an agent with threads, may hang
        start_method="fork",
    )
    record(elastic_launch(config, _worker))(argv, fault)


if __name__ == "__main__":
    import start
    import train

    stage, rank, call, act, flag = sys.argv[1:6]
    Fault(stage, int(rank), int(call), act, flag).arm()
    train.main(sys.argv[6:])
    start.end()

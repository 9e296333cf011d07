"""What sharing saves a sweep, and what kills do to one: 3 x 3 x 3 by GPTQ on captions and questions, the demo's BLIP-2.

``speed`` times `mmq sweep` as a whole against `mmq quantize` and two runs of `mmq eval`, of some of the 27
configurations, times what is left; and compares all metrics. It may be done in two parts, ``sweep`` and ``separate``,
that share a folder. ``kills`` ends a sweep again and again by SIGKILL at random moments, the command itself or (on Ray)
one of its workers, starts it again where that is needed, and compares the final table with an undisturbed one.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from mmq_kernels.bench.record import append, provenance
from mmq_kernels.demo import weights_folder
from mmq_kernels.demo.world import WorldSize, write_world
from mmq_kernels.sweep import Grid, Store

RESULTS = Path(__file__).resolve().parent / "results" / "sweep.jsonl"
BITS = (2, 3, 4)
SAMPLED = 3
"""Configurations that are run separately: all parts at 2, 3 and 4 bits."""

KILLS = 20
AT_WORK = 0.8
"""Share of kills that wait for a row first: others fall anywhere, the start of the command included."""
SMALL = WorldSize(train=32, images=48, questions=3, gallery=8)
TASKS = {"caption": "coco", "vqa": "vqav2"}
TIMES = ("seconds", "latency")

Row = dict[str, Any]


def write_grid(folder: Path, world: Path, samples: int, **more: Any) -> Path:
    path = folder / "grid.yaml"
    content = {
        "model": str(weights_folder("blip2")),
        "tasks": {task: str(world / own) for task, own in TASKS.items()},
        "calibration": {"data": [f"{task}:{world / own}" for task, own in TASKS.items()], "samples": samples},
        "methods": ["gptq"],
        "bits": list(BITS),
        "group_size": 64,
        **more,
    }
    path.write_text(yaml.safe_dump(content))
    return path


def mmq(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "mmq_kernels", *arguments, "--json"]


def timed(command: list[str]) -> tuple[float, Row]:
    started = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return time.perf_counter() - started, json.loads(done.stdout)


def engine(options: argparse.Namespace) -> list[str]:
    found = ["--engine", options.engine] + (["--threads", str(options.threads)] if options.threads else [])
    return found + (["--workers", str(options.workers)] if options.engine == "ray" else [])


def run_sweep(options: argparse.Namespace, grid: Path) -> None:
    database = options.folder / f"{options.engine}.db"
    for path in options.folder.glob(f"{database.name}*"):
        if path.is_file():
            path.unlink()
    seconds, said = timed(mmq("sweep", str(grid), "-o", str(database), *engine(options)))
    assert not said["failed"] and said["made"] == 2 * len(BITS) ** 3, said
    write(options.folder / f"{options.engine}.json", {"seconds": seconds, "threads": options.threads})


def run_separately(options: argparse.Namespace, grid: Path) -> None:
    """Some configurations one by one, as somebody without a sweep would."""
    read = Grid.read(grid)
    assert read.calibration is not None
    calibrate = [word for entry in read.calibration.data for word in ("--calibrate", entry)]
    found = {}
    started = time.perf_counter()
    for bits in BITS[:: len(BITS) // SAMPLED]:
        recipe = next(each.recipe for each in read.configurations() if set(each.factors.values()) == {bits})
        out = options.folder / f"separate-{bits}-{os.getpid()}"
        timed(mmq("quantize", read.model, "--recipe", recipe, *calibrate, "-o", str(out),
                  "--samples", str(read.calibration.samples)))  # fmt: skip
        for task, own in read.tasks.items():
            found[f"{recipe} {task}"] = timed(mmq("eval", str(out), "--task", task, "--data", str(own.data)))[1]
    write(options.folder / "separate.json", {"seconds": time.perf_counter() - started, "found": found})


def compare(options: argparse.Namespace) -> Row:
    """Seconds and metrics of both."""
    together, separate = (json.loads((options.folder / f"{name}.json").read_text()) for name in
                          (options.engine, "separate"))  # fmt: skip
    with Store(options.folder / f"{options.engine}.db", existing=True) as store:
        rows = {f"{row.recipe} {row.task}": row for row in store.results()}
    differ = 0
    for key, report in separate["found"].items():
        metrics = {name: value for name, value in report["metrics"].items() if value is not None}
        ends = {name: (each["low"], each["high"]) for name, each in report["intervals"].items()}
        size = report["size"]["bpw"], report["size"]["memory_bytes"]
        row = rows[key]
        differ += (dict(row.metrics), dict(row.intervals), (row.bpw, row.bytes)) != (metrics, ends, size)
    estimated = separate["seconds"] * len(BITS) ** 3 / SAMPLED
    return {
        "bench": "sweep_speed",
        "engine": options.engine,
        "workers": options.workers if options.engine == "ray" else 1,
        "threads_asked": together["threads"],
        "configurations": len(BITS) ** 3,
        "tasks": list(TASKS),
        "samples": {task: next(row.samples for row in rows.values() if row.task == task) for task in TASKS},
        "sweep_seconds": together["seconds"],
        "separate_sampled": SAMPLED,
        "separate_sampled_seconds": separate["seconds"],
        "separate_seconds_estimated": estimated,
        "ratio": estimated / together["seconds"],
        "compared": len(separate["found"]),
        "differ": differ,
    }


def table(path: Path) -> dict[str, Row]:
    """Rows but for times, with their predictions."""
    with Store(path, existing=True) as store:
        return {
            row.fingerprint: {name: value for name, value in asdict(row).items() if name not in TIMES}
            | {"predictions": store.predictions(row.fingerprint).read_text()}
            for row in store.results()
        }


def kills(options: argparse.Namespace, grid: Path) -> Row:
    """A sweep that is killed again and again, and one that is not."""
    dice, database, undisturbed = random.Random(options.seed), options.folder / "killed.db", options.folder / "whole.db"
    command = mmq("sweep", str(grid), "-o", str(database), *engine(options))
    killed = {"engine": 0, "worker": 0}
    running: subprocess.Popen[bytes] | None = None
    starts, begun_anew = 0, 0
    while sum(killed.values()) < options.kills:
        if running is None or running.poll() is not None:
            if running is not None and running.returncode == 0:
                begun_anew += 1
                shrink(database, dice)
            running = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
            starts += 1
        before = rows_in(database)
        if dice.random() < AT_WORK:
            wait_for_more(database, before, running)
        time.sleep(dice.uniform(0, options.most_seconds))
        workers = workers_of(running.pid) if options.engine == "ray" else []
        if running.poll() is not None:
            continue
        if workers and dice.random() < 0.5:
            kill(dice.choice(workers))
            killed["worker"] += 1
        else:
            kill(running.pid)
            running.wait()
            killed["engine"] += 1
        print(f"{killed}, {before} -> {rows_in(database)} rows", flush=True)
    if running is not None:
        running.wait()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    subprocess.run(
        mmq("sweep", str(grid), "-o", str(undisturbed), *engine(options)), stdout=subprocess.DEVNULL, check=True
    )
    one, other = table(database), table(undisturbed)
    return {
        "bench": "sweep_kills",
        "engine": options.engine,
        "kills": killed,
        "starts": starts,
        "begun_anew": begun_anew,
        "rows": len(other),
        "lost": len(other.keys() - one.keys()),
        "doubled": rows_in(database) - len(one),
        "differ": sum(one[key] != other[key] for key in one.keys() & other.keys()),
    }


def wait_for_more(database: Path, before: int, running: subprocess.Popen[bytes]) -> None:
    while running.poll() is None and rows_in(database) <= before:
        time.sleep(0.05)


def shrink(database: Path, dice: random.Random) -> None:
    """A finished sweep loses most of its rows, so that there is something to kill again."""
    with Store(database) as store:
        there = [row.fingerprint for row in store.results()]
        for fingerprint in dice.sample(there, len(there) * 3 // 4):
            store.remove(fingerprint)


def rows_in(database: Path) -> int:
    if not database.is_file():
        return 0
    with Store(database) as store:
        return len(store)


def workers_of(session: int) -> list[int]:
    """Ray's workers at work among the processes of a session, and of sessions that its processes began."""
    parents: dict[int, int] = {}
    busy: list[int] = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if (folder / "cmdline").read_bytes().startswith(b"ray::_measure"):
                busy.append(int(folder.name))
        except OSError:
            continue

    def below(process: int) -> bool:
        while process and process != session:
            process = parents.get(process, 0)
        return process == session

    return [process for process in busy if below(process)]


def kill(process: int) -> None:
    try:
        os.kill(process, signal.SIGKILL)
    except ProcessLookupError:
        print(f"{process} ended just before", file=sys.stderr)


def write(path: Path, content: Row) -> None:
    path.write_text(json.dumps(content))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=("speed", "sweep", "separate", "compare", "kills"))
    parser.add_argument("--folder", type=Path, required=True, help="for data and databases; speed needs it empty")
    parser.add_argument("--engine", choices=("local", "ray"), default="local")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, help="of each process of a sweep; default: torch's")
    parser.add_argument("--kills", type=int, default=KILLS)
    parser.add_argument("--most-seconds", type=float, default=4, help="before a kill")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS, help="file to append to")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    facts = provenance()
    if options.mode == "kills":
        world = write_world(options.folder / "world", seed=5, size=SMALL)
        quick = {"evaluation": {"meteor": False, "tokenizer": "plain"}}
        append(options.out, [kills(options, write_grid(options.folder, world, 16, **quick)) | facts])
        return
    grid = write_grid(options.folder, write_world(options.folder / "world", seed=5), 128)
    if options.mode in ("speed", "sweep"):
        run_sweep(options, grid)
    if options.mode in ("speed", "separate"):
        run_separately(options, grid)
    if options.mode in ("speed", "compare"):
        append(options.out, [compare(options) | facts])


if __name__ == "__main__":
    main()

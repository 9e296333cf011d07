"""`mmq sweep`: measure every configuration of a grid into a results database."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from mmq_kernels.cli.options import Debug, Json, print_json, progress_bar

if TYPE_CHECKING:
    from mmq_kernels.sweep import Grid, Machine, Sweep
    from mmq_kernels.sweep.run import Engine

ENGINES = ("local", "ray")
FAILED = 1
"""Exit code where some configurations could not be measured."""


def sweep(
    grid: Annotated[str | None, typer.Argument(help="A YAML or JSON file, or a shipped grid; see --list.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The results database; may be there already.")] = None,
    list_grids: Annotated[bool, typer.Option("--list", help="Show the shipped grids.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, show what would run, and stop.")
    ] = False,
    variant: Annotated[str | None, typer.Option(help="Of the grid, such as study: the study's own settings.")] = None,
    model: Annotated[str | None, typer.Option(help="Instead of the grid's: a folder or a hub name.")] = None,
    task: Annotated[
        list[str] | None, typer.Option(help="TASK:DIR, instead of the grid's tasks; may be given again.")
    ] = None,
    calibrate: Annotated[
        list[str] | None, typer.Option(help="TASK:DIR, instead of the grid's; may be given again.")
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Calibration samples in all, instead of the grid's.")] = None,
    limit: Annotated[int | None, typer.Option(help="A seeded draw of so many samples of each task.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of all draws and the intervals, instead of the grid's.")] = None,
    engine: Annotated[str, typer.Option(help="local (in this process) or ray.")] = "local",
    address: Annotated[str | None, typer.Option(help="Of a Ray cluster; without one Ray runs on this machine.")] = None,
    workers: Annotated[
        int | None, typer.Option(help="Ray: groups of configurations at a time; default: what its CPUs or GPUs allow.")
    ] = None,
    cpus_per_task: Annotated[float, typer.Option(help="Ray: CPUs that a task is given.")] = 1,
    gpus_per_task: Annotated[float, typer.Option(help="Ray: GPUs that a task is given; may be a fraction.")] = 0,
    retries: Annotated[int, typer.Option(help="Ray: how often a task whose worker was lost is begun again.")] = 3,
    threads: Annotated[int | None, typer.Option(help="CPU threads of each process; default: torch's.")] = None,
    shared_gb: Annotated[
        float | None, typer.Option(help="Memory for what configurations share; default: a quarter of the machine's.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Default: cuda if there is one, else cpu.")] = None,
    json: Json = False,
    debug: Debug = False,
) -> int:
    """Measure every configuration of GRID on its tasks: quality with intervals, bits per weight, bytes, latency.

    Nothing runs twice: what is in the database is left as it is, so a sweep that was killed is started again by the
    same command. On a Slurm cluster, in a job script with --nodes=4 --ntasks-per-node=1 --gpus-per-node=8:

        srun ray symmetric-run --address "$(hostname):6379" --min-nodes 4 -- mmq sweep GRID -o results.db --engine ray
        --address auto --gpus-per-task 1
    """
    from mmq_kernels.sweep import Grid, Store, Sweep

    if list_grids:
        _print_grids(json)
        return 0
    if grid is None or (out is None and not dry_run):
        raise ValueError("a grid and --out must be given; see --list for shipped grids")
    read = _changed(Grid.read(grid, variant, model=model, seed=seed), task, calibrate, samples, limit)
    runs = _engine(engine, address, workers, cpus_per_task, gpus_per_task, retries)
    machine = _machine(device, threads, shared_gb, engine == "ray", gpus_per_task)
    with progress_bar(f"checking {grid}") as bar:
        checked = Sweep(read, read.configurations())
        if not dry_run:
            assert out is not None
            with Store(out) as store:
                if checked.missing(store):
                    checked.check_images(bar)
                done = checked.run(store, runs, machine, bar)
    if dry_run:
        plan = _plan(checked, out)
        print_json(plan) if json else _print_plan(plan)
        return 0
    facts = {"database": str(out), "rows": len(checked.rows), **vars(done)}
    if json:
        print_json(facts)
    else:
        _print(facts)
    return FAILED if done.failed else 0


def _changed(
    grid: Grid,
    task: list[str] | None,
    calibrate: list[str] | None,
    samples: int | None,
    limit: int | None,
) -> Grid:
    """The grid with what the command line says instead of it, checked again."""
    content = grid.model_dump()
    if task:
        folders = dict(_pair(entry) for entry in task)
        content["tasks"] = {name: content["tasks"].get(name, {}) | {"data": folder} for name, folder in folders.items()}
    if limit is not None:
        content["tasks"] = {name: own | {"limit": limit} for name, own in content["tasks"].items()}
    calibration = dict(content["calibration"] or {})
    calibration |= {"data": calibrate} if calibrate else {}
    calibration |= {"samples": samples} if samples is not None else {}
    content["calibration"] = calibration or None
    return type(grid).of(content)


def _pair(entry: str) -> tuple[str, str]:
    task, colon, folder = entry.partition(":")
    if not colon or not folder:
        raise ValueError(f"task must be TASK:DIR, got {entry!r}")
    return task, folder


def _engine(name: str, address: str | None, workers: int | None, cpus: float, gpus: float, retries: int) -> Engine:
    from mmq_kernels.sweep.engines import Local

    if name not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {name!r}")
    if name == "local":
        if address is not None or workers not in (None, 1):
            raise ValueError("--address and --workers belong to --engine ray")
        return Local()
    from mmq_kernels.sweep.engines.ray import OnRay

    return OnRay(address, workers, cpus=cpus, gpus=gpus, retries=retries)


def _machine(device: str | None, threads: int | None, shared_gb: float | None, on_ray: bool, gpus: float) -> Machine:
    """Of a worker: here, or wherever Ray starts it."""
    from mmq_kernels.cli.devices import chosen_device
    from mmq_kernels.sweep import Machine

    where = (device or ("cuda" if gpus else "cpu")) if on_ray else str(chosen_device(device))
    return Machine(where, threads, None if shared_gb is None else int(shared_gb * 1e9))


def _print_grids(json: bool) -> None:
    from mmq_kernels.sweep import Grid
    from mmq_kernels.sweep.grid import shipped

    grids = {name: Grid.read(name) for name in shipped()}
    if json:
        about = {
            name: {
                "description": grid.description,
                "configurations": len(grid.configurations()),
                "tasks": list(grid.tasks),
                "variants": list(grid.variants),
                "file": str(shipped()[name]),
            }
            for name, grid in grids.items()
        }
        print_json(about)
        return
    table = Table("grid", "configurations", "tasks", "variants", "what it is")
    for name, grid in grids.items():
        count, tasks, variants = str(len(grid.configurations())), ", ".join(grid.tasks), ", ".join(grid.variants)
        table.add_row(name, count, tasks, variants, grid.description)
    Console().print(table)


def _plan(checked: Sweep, out: Path | None) -> dict[str, Any]:
    """What a dry run says."""
    from mmq_kernels.sweep import Store

    missing = checked.rows
    if out is not None and out.is_file():
        with Store(out, existing=True) as store:
            missing = checked.missing(store)
    shared = checked.shared
    return {
        "rows": len(checked.rows),
        "there": len(checked.rows) - len(missing),
        "missing": [
            {"configuration": str(r.configuration), "recipe": r.configuration.recipe, "task": r.task} for r in missing
        ],
        "quantizations": {
            name: {"shared": done, "alone": alone} for name, (done, alone) in shared.quantizations.items()
        },
        "image_features": {"shared": shared.features[0], "alone": shared.features[1]},
    }


def _print_plan(plan: dict[str, Any]) -> None:
    console = Console()
    for row in plan["missing"]:
        console.print(
            f"{row['task']}: {row['configuration']} [dim]{row['recipe'] or 'as it is'}[/dim]",
            highlight=False,
            soft_wrap=True,
        )
    console.print(f"{plan['rows']} rows, {plan['there']} there, {len(plan['missing'])} to be made")
    for name, count in plan["quantizations"].items():
        console.print(f"{name or 'outside'}: quantized {count['shared']} times, {count['alone']} without sharing")
    features = plan["image_features"]
    console.print(f"image features: made {features['shared']} times, {features['alone']} without sharing")


def _print(facts: dict[str, Any]) -> None:
    console = Console()
    for what, why in facts["failed"].items():
        console.print(f"failed: {what}: {why}", highlight=False, markup=False)
    console.print(
        f"{facts['database']}: {facts['made']} rows made, {facts['there']} were there, {len(facts['failed'])} failed, "
        f"{facts['rows']} in all, in {facts['seconds']:.1f} s"
    )

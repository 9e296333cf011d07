"""Runs that can be killed: finished blocks beside the checkpoint to be, so that `--resume` goes on behind them.

``OUT.partial/run.json`` says what the run is made of; each finished block is one safetensors file, written beside
and renamed, with its layers' reports in the header. Quantization is deterministic, so a resumed run ends in the
same bits as an undisturbed one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mmq_kernels.checkpoint.errors import CheckpointError
from mmq_kernels.checkpoint.folder import one_line
from mmq_kernels.quantize.sequential import LayerReport

RUN = "run.json"
_SEPARATOR = "::"


class PartialRun:
    """The blocks finished so far of a run that will end in the checkpoint `out`.

    Args:
        out: the checkpoint folder to be.
        identity: everything the result depends on, by name.
        resume: go on with what is there; else something left behind is an error.

    Raises:
        ValueError: for a run left behind without `resume`, or one made of something else.
    """

    def __init__(self, out: str | Path, identity: Mapping[str, str], *, resume: bool) -> None:
        out = Path(out)
        self.folder = out.with_name(f"{out.name}.partial")
        run = self.folder / RUN
        if run.is_file():
            if not resume:
                raise ValueError(f"{self.folder} holds an unfinished run; go on with --resume, or delete it")
            before = json.loads(run.read_text())
            for key in {**before, **identity}:
                if before.get(key) != identity.get(key):
                    raise ValueError(
                        f"{self.folder} was started with {key} {before.get(key)!r}, not {identity.get(key)!r}; "
                        f"delete it or ask for the same again"
                    )
        self.folder.mkdir(parents=True, exist_ok=True)
        if not run.is_file():
            _replace(run, json.dumps(dict(identity), indent=2).encode())

    def load(self, block: str) -> tuple[dict[str, dict[str, Tensor]], list[LayerReport]] | None:
        """See `BlockStore`."""
        path = self._path(block)
        if not path.is_file():
            return None
        layers: dict[str, dict[str, Tensor]] = {}
        with safe_open(path, framework="pt") as file:
            reports = [LayerReport(**row) for row in json.loads(file.metadata()["reports"])]
            for key in file.keys():  # noqa: SIM118 (no mapping)
                layer, name = key.split(_SEPARATOR)
                layers.setdefault(layer, {})[name] = file.get_tensor(key).clone()
        return layers, reports

    def save(self, block: str, layers: dict[str, dict[str, Tensor]], reports: list[LayerReport]) -> None:
        """See `BlockStore`.

        Raises:
            CheckpointError: where it cannot be written; the blocks before it are kept.
        """
        tensors: dict[str, Tensor] = {}
        addresses: set[int] = set()
        for layer, own in layers.items():
            for name, tensor in own.items():
                tensor = tensor.contiguous().cpu()
                if tensor.data_ptr() in addresses:
                    tensor = tensor.clone()  # layers that read the same input share their scale; a file cannot
                addresses.add(tensor.data_ptr())
                tensors[f"{layer}{_SEPARATOR}{name}"] = tensor
        path = self._path(block)
        beside = path.with_suffix(".tmp")
        try:
            save_file(tensors, beside, metadata={"reports": json.dumps([report.to_json() for report in reports])})
            _sync_and_rename(beside, path)
        except (OSError, SafetensorError) as error:
            beside.unlink(missing_ok=True)
            raise CheckpointError(f"{path} could not be written: {one_line(error)}; then --resume") from error

    @property
    def finished(self) -> int:
        """Blocks that are done."""
        return len(list(self.folder.glob("*.safetensors")))

    def remove(self) -> None:
        """The run is over: the checkpoint stands."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, block: str) -> Path:
        return self.folder / f"{block}.safetensors"


def _replace(path: Path, content: bytes) -> None:
    beside = path.with_name(f"{path.name}.tmp")
    beside.write_bytes(content)
    _sync_and_rename(beside, path)


def _sync_and_rename(beside: Path, path: Path) -> None:
    with beside.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(beside, path)

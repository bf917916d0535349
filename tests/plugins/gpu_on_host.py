"""The real torch with a GPU made of the host's memory, for tests of the code around a kernel.

In front on PYTHONPATH it is what `import torch` finds; it steps aside and dresses up the real one. A tensor
moved to "cuda" is a copy, as on a GPU; kernels' errors appear at the next synchronization.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path[:] = [entry for entry in sys.path if entry != str(Path(__file__).parent)]
del sys.modules["torch"]

import torch  # noqa: E402

_to, _full = torch.Tensor.to, torch.full
_errors: list[str] = []


def _moved(tensor: Any, *arguments: Any, **options: Any) -> Any:
    if arguments == ("cuda",) and not options:
        return tensor.clone()
    return _to(tensor, *arguments, **options)


def _filled(*arguments: Any, **options: Any) -> Any:
    return _full(*arguments, **{**options, "device": "cpu"})


def _synchronize() -> None:
    if _errors:
        raise RuntimeError(_errors[0])  # every later call fails as well


torch.version.cuda = "13.0"
torch.Tensor.to = _moved
torch.full = _filled
torch.cuda.is_available = lambda: True
torch.cuda.synchronize = _synchronize
torch.cuda.fail_later = _errors.append
torch.cuda.device_count = lambda: 1
torch.cuda.get_device_name = lambda index=0: "a GPU on the host"
torch.cuda.current_device = lambda: 0
torch.cuda.current_stream = lambda: SimpleNamespace(cuda_stream=0)
torch.cuda.memory_snapshot = list
torch._C._cuda_getDriverVersion = lambda: 13000

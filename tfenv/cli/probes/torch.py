"""What `tfgpu doctor` and `tfgpu verify` ask of PyTorch. Its text follows that of `framework.py`."""

from importlib import import_module
from typing import Any

TYPE_CHECKING = False
if TYPE_CHECKING:
    from tfenv.cli.probes.framework import Probe, is_policy_error, run_probe


class TorchProbe(Probe):
    """PyTorch. It takes memory as it needs it, so that nothing has to ask for growth."""

    name = "torch"

    def describe(self) -> "dict[str, Any]":
        """Return what PyTorch sees. It opens CUDA to name the GPUs. A PolicyError is let through."""
        torch: Any = import_module("torch")
        problem = ""
        try:
            gpus = [_describe_gpu(torch, number) for number in self.list_ordinals()]
        except RuntimeError as error:
            if is_policy_error(error):
                raise
            gpus, problem = [], str(error).strip().partition("\n")[0]
        return {
            "version": torch.__version__,
            "gpus": gpus,
            "problem": problem,
            "install": "pip install torch, see https://pytorch.org/get-started/locally",
        }

    def find_cuda_version(self) -> "str | None":
        """Return what the build says."""
        torch: Any = import_module("torch")
        return None if torch.version.cuda is None else str(torch.version.cuda)

    def list_ordinals(self) -> "list[int]":
        """Return all ordinals: PyTorch lists what CUDA shows."""
        torch: Any = import_module("torch")
        if torch.cuda.is_available():
            torch.cuda.init()  # before, it counts by NVML
        return list(range(torch.cuda.device_count()))

    def allocate(self, place: int, size: int) -> object:
        """Make a tensor of single bytes, and write nothing into it."""
        torch: Any = import_module("torch")
        return torch.empty(size, dtype=torch.uint8, device=f"cuda:{place}")

    def is_refusal(self, error: Exception) -> bool:
        """Return whether memory is exhausted."""
        torch: Any = import_module("torch")
        return isinstance(error, torch.cuda.OutOfMemoryError)


def _describe_gpu(torch: "Any", number: int) -> "dict[str, str]":
    properties = torch.cuda.get_device_properties(number)
    capability = f"{properties.major}.{properties.minor}"
    return {"device": f"cuda:{number}", "name": str(properties.name), "capability": capability}


if __name__ == "__main__":
    run_probe(TorchProbe())

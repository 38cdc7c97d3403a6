"""What `tfgpu doctor` and `tfgpu verify` ask of JAX. Its text follows that of `framework.py`."""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any, ClassVar

TYPE_CHECKING = False
if TYPE_CHECKING:
    from tfenv.cli.probes.framework import Probe, is_policy_error, run_probe

_CUDA_RELEASES = ("13", "12")


class JaxProbe(Probe):
    """JAX. It lists GPUs by opening them, so that listing takes a context of each, and without growth much more."""

    name = "jax"
    growing: ClassVar[dict[str, str]] = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    listing: ClassVar[dict[str, str]] = growing

    def describe(self) -> "dict[str, Any]":
        """Return what JAX sees. It opens the GPUs and allocates nothing of them."""
        jax: Any = import_module("jax")
        release = self.find_cuda_version()
        gpus, problem = _list_gpus()
        return {
            "version": jax.__version__,
            "gpus": [
                {
                    "device": f"cuda:{gpu.id}",
                    "name": str(gpu.device_kind),
                    "capability": str(getattr(gpu, "compute_capability", "")),
                }
                for gpu in gpus
            ],
            "problem": problem if release is not None else "",
            "install": f"pip install 'jax[cuda{release or _CUDA_RELEASES[0]}]'",
        }

    def find_cuda_version(self) -> "str | None":
        """Return the release of CUDA in the name of the installed plugin."""
        for release in _CUDA_RELEASES:
            try:
                version(f"jax-cuda{release}-plugin")
            except PackageNotFoundError:
                continue
            return release
        return None

    def list_ordinals(self) -> "list[int]":
        """Return the devices' hardware ids, which are CUDA's ordinals."""
        return [int(gpu.local_hardware_id) for gpu in _list_gpus()[0]]

    def allocate(self, place: int, size: int) -> object:
        """Make an array of single bytes. No memory of the host is filled for it."""
        jax: Any = import_module("jax")
        with jax.default_device(_list_gpus()[0][place]):  # the value comes from there, too
            return jax.numpy.full((size,), 1, jax.numpy.uint8).block_until_ready()

    def is_refusal(self, error: Exception) -> bool:
        """Return whether memory is exhausted: JAX has no class of its own for it."""
        return "RESOURCE_EXHAUSTED" in str(error)


def _list_gpus() -> "tuple[list[Any], str]":
    """Return the GPUs of this process, and why there is none in JAX's own words. A PolicyError is let through."""
    jax: Any = import_module("jax")
    try:
        return list(jax.local_devices(backend="cuda")), ""
    except RuntimeError as error:
        if is_policy_error(error):
            raise
        return [], str(error).strip().partition("\n")[0]


if __name__ == "__main__":
    run_probe(JaxProbe())

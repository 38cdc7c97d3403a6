"""What `tfgpu doctor` and `tfgpu verify` ask of TensorFlow. Its text follows that of `framework.py`."""

from importlib import import_module
from typing import Any, ClassVar

TYPE_CHECKING = False
if TYPE_CHECKING:
    from tfenv.cli.probes.framework import Probe, find_missing_libraries, run_probe

#: What it must find to list a GPU, besides the cuDNN of its release.
_LIBRARIES = (
    "libcuda.so.1",
    "libcudart.so.12",
    "libcublas.so.12",
    "libcublasLt.so.12",
    "libcufft.so.11",
    "libcusolver.so.11",
    "libcusparse.so.12",
)
_FIRST_WITH_CUDNN_9 = (2, 18)


class TensorFlowProbe(Probe):
    """TensorFlow. Its devices are made by the first tensor, so listing takes no memory."""

    name = "tensorflow"
    growing: ClassVar[dict[str, str]] = {"TF_FORCE_GPU_ALLOW_GROWTH": "true"}

    def describe(self) -> "dict[str, Any]":
        """Return what TensorFlow sees. It lists devices and creates none."""
        tf: Any = import_module("tensorflow")
        gpus = tf.config.list_physical_devices("GPU")
        missing = (
            [] if gpus or self.find_cuda_version() is None else find_missing_libraries(_list_libraries(tf.__version__))
        )
        return {
            "version": tf.__version__,
            "devices": [_shorten_name(device) for device in tf.config.list_physical_devices()],
            "gpus": [_describe_gpu(tf, gpu) for gpu in gpus],
            "problem": f"not found: {', '.join(missing)}" if missing else "",
            "install": "pip install 'tensorflow[and-cuda]'",
            "several_gpus": "build and compile it in `with tf.distribute.MirroredStrategy().scope():`",
        }

    def find_cuda_version(self) -> "str | None":
        """Return what the build says."""
        tf: Any = import_module("tensorflow")
        return str(tf.sysconfig.get_build_info().get("cuda_version") or "") if tf.test.is_built_with_cuda() else None

    def list_ordinals(self) -> "list[int]":
        """Return the ordinals in the devices' names. TensorFlow leaves out the cards that it ignores."""
        tf: Any = import_module("tensorflow")
        gpus = tf.config.list_physical_devices("GPU")
        # Under a policy that leaves it none, TensorFlow makes no device of a GPU that it lists.
        return [int(gpu.name.rpartition(":")[2]) for gpu in gpus] if tf.config.list_logical_devices("GPU") else []

    def allocate(self, place: int, size: int) -> object:
        """Make a tensor of single bytes."""
        tf: Any = import_module("tensorflow")
        with tf.device(f"/GPU:{place}"):
            return tf.zeros([size], tf.uint8)

    def is_refusal(self, error: Exception) -> bool:
        """Return whether memory is exhausted."""
        tf: Any = import_module("tensorflow")
        return isinstance(error, tf.errors.ResourceExhaustedError)


def _describe_gpu(tf: "Any", gpu: "Any") -> "dict[str, str]":
    details = tf.config.experimental.get_device_details(gpu)
    capability = ".".join(str(part) for part in details.get("compute_capability", ()))
    return {"device": _shorten_name(gpu), "name": details.get("device_name", ""), "capability": capability}


def _shorten_name(device: "Any") -> str:
    return str(device.name).replace("/physical_device:", "")


def _list_libraries(version: str) -> "tuple[str, ...]":
    numbers = tuple(int(part) for part in version.split(".")[:2])
    return (*_LIBRARIES, "libcudnn.so.9" if numbers >= _FIRST_WITH_CUDNN_9 else "libcudnn.so.8")


if __name__ == "__main__":
    run_probe(TensorFlowProbe())

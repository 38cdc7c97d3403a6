"""What PyInstaller cannot see: modules that tfenv imports by name, and the schema it reads.

PyInstaller runs this file when it freezes a program that imports tfenv.
"""

from importlib.metadata import files

from PyInstaller.utils.hooks import collect_submodules

from tfenv.config.schema import schema_path

#: What is for people, and not part of a program.
_LEFT_OUT = ("tfenv.cli", "tfenv.deploy", "tfenv.policy_tests", "tfenv.simulate", "tfenv.watch")

hiddenimports = [
    *collect_submodules("tfenv", filter=lambda name: not name.startswith(_LEFT_OUT)),
    "tomli",
    "structlog",
    "pynvml",
    "jsonschema",
    # tomli's compiled modules import this one, whose name is a hash.
    *(file.name.partition(".")[0] for file in files("tomli") or () if "__mypyc." in file.name),
]
#: A program brings its frameworks itself. For others they would be a gigabyte too much.
excludedimports = ["tensorflow", "google", "jax", "jaxlib", "msgspec", "torch"]
datas = [(str(schema_path()), "tfenv/schemas")]

"""What is done where tfenv itself cannot be loaded or fails: one line, one record, and what `on_error` says.

It must work where nothing else of tfenv does. It imports nothing that is a file.
"""

import os
import sys

#: Literal, as the administrator's policy always is.
MACHINE_POLICY = "/etc/tfgpu/tfgpu.toml"
_MOST_BYTES = 1 << 18
_LONGEST_TEXT = 500
# As in the module `stat`, which is a file.
_TYPE, _REGULAR, _OTHERS_WRITE = 0o170000, 0o100000, 0o022
_said: "set[str]" = set()


class PolicyError(RuntimeError):
    """The policy cannot be applied and `on_error = "fail"`. It stands in for that of `tfenv.errors`."""


def handle(error: BaseException, name: str, on_error: "str | None" = None) -> None:
    """Say and record that no policy is applied, and do what `on_error` says.

    Args:
        error: What went wrong.
        name: The framework that is imported.
        on_error: What the policy says. None: it is not known, and the machine's file is asked.

    Raises:
        RuntimeError: `on_error = "fail"`. A PolicyError where that can be imported.
    """
    on_error = on_error or read_machine_on_error()
    text = f"tfenv failed at import {name}: {type(error).__name__}: {error}"[:_LONGEST_TEXT]
    if on_error == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    follows = "NO GPU may be used" if on_error == "cpu" else "no policy is applied"
    line = f'{text}: {follows} (on_error = "{on_error}") [internal-error]'
    if line not in _said:
        _said.add(line)
        _write_record(text, name, on_error)
        if on_error != "fail":
            _say(line)
    if on_error == "fail":
        raise _make_policy_error(text) from error


def wait_for_package(folder: str) -> bool:
    """Wait, 5 s at most, while an installer replaces the package.

    Args:
        folder: It holds the package.

    Returns:
        Whether the package is there. False: it is half uninstalled.
    """
    import time

    for _ in range(100):
        try:
            names = os.listdir(folder)
        except OSError:
            return True
        # pip renames what it replaces to `~fenv`, and writes RECORD last.
        records = [f"{folder}/{name}/RECORD" for name in names if name.startswith("tfenv-")]
        if all(map(os.path.exists, records)) and not any(name.startswith("~fenv") for name in names):
            break
        time.sleep(0.05)
    return os.path.exists(f"{folder}/tfenv/__init__.py") and os.path.isdir(f"{folder}/tfenv/runtime")


def read_machine_on_error(path: str = MACHINE_POLICY) -> str:
    """Return the `on_error` of the machine's policy, told without a parser of TOML. "warn" where it says nothing.

    Args:
        path: The file. It counts if it is root's and nobody else can write to it.
    """
    try:
        text = _read_roots_file(path)
    except OSError:
        return "warn"
    for line in text.splitlines():
        key, equals, value = line.strip().partition("=")
        if key.startswith("["):
            return "warn"
        value = value.partition("#")[0].strip()
        if equals and key.strip().strip("\"'") == "on_error" and value[1:-1] in ("warn", "cpu", "fail"):
            return value[1:-1]
    return "warn"


def _read_roots_file(path: str) -> str:
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    try:
        status = os.fstat(descriptor)
        if status.st_uid not in (0, _find_outer_root()) or status.st_mode & _OTHERS_WRITE or not _is_regular(status):
            return ""
        return os.read(descriptor, _MOST_BYTES).decode(errors="replace").removeprefix("\ufeff")
    finally:
        os.close(descriptor)


def _find_outer_root() -> int:
    """Return the uid that stands for root in a user namespace that does not map it. 0: root is root."""
    try:
        with open("/proc/self/uid_map", encoding="ascii") as file:
            if any(line.split()[1] == "0" for line in file):
                return 0
        with open("/proc/sys/kernel/overflowuid", encoding="ascii") as file:
            return int(file.read())
    except (OSError, ValueError, IndexError):
        return 0


def _is_regular(status: os.stat_result) -> bool:
    return status.st_mode & _TYPE == _REGULAR


def _make_policy_error(text: str) -> RuntimeError:
    try:
        from tfenv.errors import Finding
        from tfenv.errors import PolicyError as RealPolicyError

        return RealPolicyError((Finding("internal-error", text),))
    except Exception:  # noqa: BLE001 - that is why we are here
        return PolicyError(f"{_show(text)} [internal-error]")


def _show(text: str) -> str:
    return "".join(char if " " <= char <= "~" else ascii(char)[1:-1] for char in text)


def _say(text: str) -> None:
    try:
        sys.stderr.write(f"tfgpu: {_show(text)}\n")
        sys.stderr.flush()
    except Exception:  # noqa: BLE001 - a daemon has no stderr
        return


def _write_record(text: str, name: str, on_error: str) -> None:
    """Append a record of its own to the user's default log. What fails here costs the record."""
    try:
        import pwd

        uid = os.geteuid()
        user = pwd.getpwuid(uid)
        log = f"{_find_state_home(user.pw_dir)}/tfgpu/audit.jsonl"
        os.makedirs(os.path.dirname(log), 0o700, exist_ok=True)
        line = _encode({**_describe_process(user.pw_name, uid), **_describe_fault(text, name, on_error)}) + "\n"
        _append(log, line.encode(), uid)
    except (OSError, KeyError, ImportError) as problem:
        _say(f"no audit record was written: {problem}")


def _find_state_home(home: str) -> str:
    """Return where the user's own log is: in $XDG_STATE_HOME, if that is absolute and the user's own."""
    state_home = os.environ.get("XDG_STATE_HOME") or ""
    elevated = "SUDO_UID" in os.environ or os.getuid() != os.geteuid()
    if state_home.startswith("/") and not elevated:
        return state_home.rstrip("/")
    return f"{home.rstrip('/')}/.local/state"


def _describe_process(user: str, uid: int) -> "dict[str, object]":
    import time

    seconds, nanoseconds = divmod(time.time_ns(), 10**9)
    script = getattr(sys.modules.get("__main__"), "__file__", None)
    return {
        "timestamp": f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{nanoseconds // 1000:06}Z",
        "event": "policy_failed",
        "level": "error",
        "host": os.uname().nodename,
        "user": user,
        "uid": uid,
        "pid": os.getpid(),
        "ppid": os.getppid(),
        "script": os.path.abspath(script) if isinstance(script, str) else None,
        "python": ".".join(str(part) for part in sys.version_info[:3]),
    }


def _describe_fault(text: str, name: str, on_error: str) -> "dict[str, object]":
    return {
        "framework": name,
        "framework_version": None,
        "project": None,
        "status": "failed",
        "on_error": on_error,
        "grant": None,
        "sources": [],
        "findings": [{"code": "internal-error", "severity": "error", "message": text}],
    }


def _append(path: str, line: bytes, uid: int) -> None:
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
    descriptor = os.open(path, flags, 0o600)
    try:
        status = os.fstat(descriptor)
        if status.st_uid in (0, uid) and status.st_nlink == 1 and _is_regular(status):
            os.write(descriptor, line)
    finally:
        os.close(descriptor)


def _encode(value: object) -> str:
    """Write plain values as JSON, in ASCII."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{_encode(key)}:{_encode(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(_encode(item) for item in value) + "]"
    if isinstance(value, str):
        return '"' + "".join(_escape(char) for char in value) + '"'
    return "null" if value is None else str(value)


def _escape(char: str) -> str:
    if " " <= char <= "~" and char not in '"\\':
        return char
    units = char.encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[start : start + 4]}" for start in range(0, len(units), 4))

"""Draw docs/assets/report.png: the page of `tfgpu audit report` for a small machine, as a browser shows it.

    python tools/report_picture.py

The log is made up: two weeks of five people on two GPUs. The page is what the command makes of it. It needs playwright
and Chromium, and is not compared by a test: browsers differ in their fonts.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "assets" / "report.png"
GIB = 1 << 30
#: Each with a program, a limit in GiB and the part of it that is taken.
PEOPLE = {
    "alice": ("train.py", 8, 0.9),
    "bob": ("finetune.py", 12, 0.97),
    "carol": ("evaluate.py", 12, 0.15),
    "dave": ("notebook.ipynb", 16, 0.05),
    "erin": ("sweep.py", 8, 0.6),
}
BEGIN = datetime(2026, 11, 2, 7, tzinfo=timezone.utc)


def list_records() -> Iterator[dict[str, Any]]:
    chosen = random.Random(7)
    for number in range(90):
        user = chosen.choices(list(PEOPLE), (4, 3, 2, 1, 5))[0]
        program, limit, part = PEOPLE[user]
        day, hour = chosen.choice((0, 1, 2, 3, 4, 7, 8, 9, 10, 11)), chosen.gauss(5, 3)
        begin = BEGIN + timedelta(days=day, hours=max(0.0, hour))
        length = timedelta(hours=chosen.lognormvariate(0.3, 1.1) * (4 if user == "dave" else 1))
        gpu = chosen.randrange(2)
        device: dict[str, Any] = {
            "index": 0, "token": str(gpu), "uuid": f"GPU-a{gpu}fa4e00-0000-4000-8000-000000000000",
            "name": "NVIDIA A10",
            "limit_bytes": limit * GIB, "limit_fraction": None, "total_bytes": 24 * GIB,
        }  # fmt: skip
        common = {
            "host": "gpu1", "user": user, "pid": 4000 + number, "start_ticks": number, "findings": [],
            "script": f"/home/{user}/{program}", "framework": "tensorflow",
        }  # fmt: skip
        waited = chosen.choice((0, 0, 0, 1)) * chosen.uniform(20, 1500) * 1000
        choice = {"allocations": [], "lease": "x", "waited_ms": round(waited)}
        is_cut = user == "bob" and chosen.random() < 0.6
        event = "policy_clamped" if is_cut else "policy_applied"
        cut = {"cut": [chosen.choice(("memory_limit", "visible_devices"))]} if is_cut else {}
        yield {"timestamp": format_time(begin), "event": event, "devices": [device], "choice": choice, **cut, **common}
        if chosen.random() < 0.06:
            yield {"timestamp": format_time(begin + length), "event": event, "devices": [device], **cut, **common}
            continue
        peak = int(limit * GIB * min(0.995, part * chosen.uniform(0.8, 1.05)))
        yield {
            "timestamp": format_time(begin + length), "event": "policy_ended", **common,
            "devices": [{**device, "peak_bytes": peak}], "duration_ms": length.total_seconds() * 1000 + 4000,
        }  # fmt: skip


def format_time(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def main() -> None:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with tempfile.TemporaryDirectory() as folder:
        log, page_file = Path(folder, "audit.jsonl"), Path(folder, "report.html")
        log.write_text("".join(f"{json.dumps(record)}\n" for record in list_records()), encoding="utf-8")
        command = [sys.executable, "-m", "tfenv", "audit", "report", "--html", page_file.name, "--file", log.name]
        env = {**os.environ, "TZ": "UTC", "PYTHONPATH": str(ROOT)}
        subprocess.run(command, cwd=folder, env=env, check=True)
        with sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
            page = browser.new_page(viewport={"width": 1060, "height": 1000})
            page.goto(page_file.as_uri())
            page.click("header summary")  # what was read is told beside the picture
            end = page.query_selector("#events")
            box = None if end is None else end.bounding_box()
            height = 1000 if box is None else box["y"]
            page.screenshot(path=str(PICTURE), full_page=True, clip={"x": 0, "y": 0, "width": 1060, "height": height})
            browser.close()
    print(f"{PICTURE}: {PICTURE.stat().st_size} bytes")


if __name__ == "__main__":
    main()

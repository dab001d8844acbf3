"""The recipe and the commands of docs/stores.md, on an S3 server."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from s3 import ENVIRONMENT, running_s3
from server import BadServer, picture

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "stores.md").read_text(encoding="utf-8")


def test_the_commands_of_the_page_run(tmp_path: Path) -> None:
    (recipe,) = re.findall(r"^```yaml\n(.*?)^```", PAGE, re.S | re.M)
    (tmp_path / "pets.yaml").write_text(recipe + "fetch: {allow_private: true}\n")
    pictures = {f"/{n}": ("image/jpeg", picture(60 + 8 * n, 80)) for n in range(4)}
    with BadServer(pictures) as server, running_s3() as s3:
        s3.client().create_bucket(Bucket="my-bucket")
        (tmp_path / "pets.csv").write_text("url,caption\n" + "".join(f"{server.url(p)},a pet\n" for p in pictures))
        environment = {**os.environ, **s3.environment()}
        said = []
        for line in re.findall(r"^\$ (mmdata .*)$", PAGE, re.M):
            command = [sys.executable, "-c", "from mmdata.cli import main; main()", *shlex.split(line)[1:]]
            runner = ["--runner", "inline"] if " run " in line else []
            done = subprocess.run(
                [*command, *runner], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, f"{line}: {done.stderr}"
            said.append(done.stdout + done.stderr)
        assert len(said) == 4
        assert re.search(r"kept\W+3\b", said[2])
        everything = b"".join(s3.objects("my-bucket").values()) + "".join(said).encode()
        everything += b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    secrets = [value.encode() for name, value in ENVIRONMENT.items() if "KEY" in name]
    assert len(secrets) == 2
    assert not any(secret in everything for secret in secrets), "credentials are nowhere"

"""MLflow's database in a workspace, as it is before the first run."""

import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path


def lay_database(workspace: Path) -> None:
    """Lay an empty database where a workspace has it: to make its tables takes MLflow seven seconds, each time."""
    workspace.mkdir(parents=True, exist_ok=True)
    (workspace / "mlflow.db").write_bytes(_empty())


@cache
def _empty() -> bytes:
    """Make one in a process of its own: what MLflow says when it is imported is nobody's here."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mlflow.db"
        code = "import sys; from pipeline.tracking.sending import connect; connect(sys.argv[1])"
        subprocess.run([sys.executable, "-c", code, f"sqlite:///{path}"], check=True)
        return path.read_bytes()

"""A real Slurm on this machine for the time of a test session: no root, no service, no file in
/etc. Several nodes are several slurmd's of one host; their GPUs are links to /dev/null."""

from __future__ import annotations

import contextlib
import getpass
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

INSTALL = "apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge"
_DAEMONS = ("munged", "slurmctld", "slurmd")
_PROGRAMS = (*_DAEMONS, "sbatch", "srun", "scontrol", "squeue", "scancel", "sinfo")
_SYSTEM_FOLDERS = "/usr/local/sbin:/usr/sbin:/sbin"
_ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
_PREFIX = "msl."
KILL_WAIT_SECONDS = 5


def why_not() -> str | None:
    """Why no Slurm can be started on this machine; None where one can."""
    if not sys.platform.startswith("linux"):
        return "Slurm needs Linux"
    missing = [program for program in _PROGRAMS if path_of(program) is None]
    return f"no {', '.join(missing)}; install them: {INSTALL}" if missing else None


def path_of(program: str) -> str | None:
    """Where a program of Slurm lies, also where only root looks."""
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:{_SYSTEM_FOLDERS}")


class MiniSlurm:
    """`num_nodes` nodes of 8 cores and `num_gpus` GPUs each; partition ci, and low that yields."""

    def __init__(self, *, num_nodes: int = 2, num_gpus: int = 2) -> None:
        self.num_nodes, self.num_gpus = num_nodes, num_gpus
        # Short: munge's socket lies in it, and the path of a socket ends at 107 bytes.
        self.root = Path(tempfile.mkdtemp(prefix=_PREFIX, dir="/tmp"))
        self.conf = self.root / "etc" / "slurm.conf"
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def environment(self) -> dict[str, str]:
        """Ours, without what a Slurm around this test says, and with this one's."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("SLURM_", "SBATCH_", "SALLOC_", "SRUN_", "SQUEUE_"))
        }
        path = f"{kept.get('PATH', '')}:{_SYSTEM_FOLDERS}"
        return {**kept, "SLURM_CONF": str(self.conf), "PATH": path}

    def start(self) -> None:
        """Start all daemons and wait until every node is idle."""
        sweep()
        try:
            self._write_files()
            run = self.root / "run"
            files = {"socket": "munge.socket", "pid-file": "munged.pid", "seed-file": "seed"}
            munge_files = [f"--{name}={run}/{file}" for name, file in files.items()]
            key = f"--key-file={self.root}/etc/munge.key"
            log = f"--log-file={self.root}/log/munged.log"
            self._spawn("munged", "munged", "-F", "--force", key, log, *munge_files)
            self.wait_until((run / "munge.socket").exists, "munged")
            self._spawn("slurmctld", "slurmctld", "-D", "-c", "-f", str(self.conf))
            for node in self._nodes():
                self._spawn(node, "slurmd", "-D", "-c", "-N", node, "-f", str(self.conf))
            self.wait_until(self._is_idle, "all nodes idle")
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End all jobs, then the daemons, then what is left; remove the folder."""
        with contextlib.suppress(subprocess.SubprocessError, OSError):
            self.run("scancel", "--full", "--user", getpass.getuser(), check=False)
            deadline = time.monotonic() + KILL_WAIT_SECONDS + 10
            while self.run("squeue", "-h", check=False).stdout and time.monotonic() < deadline:
                time.sleep(0.1)
        for daemon in reversed(self._daemons.values()):  # slurmd's, slurmctld, munged
            daemon.terminate()
            try:
                daemon.wait(15)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self._daemons.clear()
        _kill_all_of(self.conf)
        shutil.rmtree(self.root, ignore_errors=True)

    def run(
        self, *command: str, check: bool = True, cwd: Path | None = None, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a client of Slurm; `variables` are added to the environment."""
        answer = subprocess.run(
            command,
            env={**self.environment, **variables},
            cwd=cwd,
            text=True,
            capture_output=True,
            timeout=60,
            check=False,
        )
        assert answer.returncode == 0 or not check, f"{command}: {answer.stdout}{answer.stderr}"
        return answer

    def submit(self, *arguments: str | Path, cwd: Path) -> int:
        """Number of a new job."""
        answer = self.run("sbatch", "--parsable", *map(str, arguments), cwd=cwd)
        return int(answer.stdout)

    def job(self, job: int | str) -> dict[str, str]:
        """What scontrol says of a job."""
        shown = self.run("scontrol", "-o", "show", "job", str(job)).stdout.splitlines()[0]
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)

    def wait(self, job: int | str, *, seconds: float = 90) -> dict[str, str]:
        """Wait for the end of a job; what scontrol then says of it."""
        deadline = time.monotonic() + seconds
        while (facts := self.job(job))["JobState"] not in _ENDED:
            if time.monotonic() > deadline:
                raise TimeoutError(f"job {job} is still {facts['JobState']} {facts['Reason']}")
            time.sleep(0.1)
        return facts

    def wait_until(self, condition: Callable[[], Any], what: str, *, seconds: float = 60) -> None:
        """Poll; fails after the time or when a daemon has died."""
        deadline = time.monotonic() + seconds
        while not condition():
            dead = [name for name, daemon in self._daemons.items() if daemon.poll() is not None]
            if dead or time.monotonic() > deadline:
                raise TimeoutError(f"waited in vain for: {what}; dead: {dead}\n{self.logs()}")
            time.sleep(0.05)

    def logs(self) -> str:
        """The ends of the daemons' logs."""
        files = sorted((self.root / "log").glob("*"))
        return "\n".join(f"--- {file.name}\n{file.read_text()[-2000:]}" for file in files)

    def _nodes(self) -> list[str]:
        return [f"node{number + 1}" for number in range(self.num_nodes)]

    def _is_idle(self) -> bool:
        states = self.run("sinfo", "-h", "-N", "-p", "ci", "-o", "%T", check=False).stdout.split()
        return states == ["idle"] * self.num_nodes

    def _spawn(self, name: str, program: str, *arguments: str) -> None:
        path = path_of(program)
        assert path is not None
        # The daemons end with us, even if we are killed.
        with_us = ["setpriv", "--pdeathsig", "TERM", "--"] if shutil.which("setpriv") else []
        with (self.root / "log" / f"{name}.out").open("ab") as log:
            self._daemons[name] = subprocess.Popen(
                [*with_us, path, *arguments],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.root,
                start_new_session=True,
            )

    def _write_files(self) -> None:
        for folder in ("etc", "state", "log", "run", "dev", *map("spool/{}".format, self._nodes())):
            (self.root / folder).mkdir(parents=True, exist_ok=True)
        (self.root / "owner").write_text(str(os.getpid()))
        for number in range(self.num_gpus):
            (self.root / "dev" / f"nvidia{number}").symlink_to("/dev/null")
        key = os.open(self.root / "etc" / "munge.key", os.O_WRONLY | os.O_CREAT, 0o600)
        os.write(key, os.urandom(1024))
        os.close(key)
        self.conf.write_text(self._configuration())
        gpus = f"Name=gpu Type=h100 File={self.root}/dev/nvidia[0-{self.num_gpus - 1}]"
        (self.root / "etc" / "gres.conf").write_text(f"NodeName=node[1-{self.num_nodes}] {gpus}\n")
        (self.root / "etc" / "plugstack.conf").touch()
        # Loaded but never used; the others need a cgroup file system of a kind.
        (self.root / "etc" / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")

    def _configuration(self) -> str:
        address, communication = _address()
        host, user = socket.gethostname().split(".")[0], getpass.getuser()
        ports = _free_ports(1 + self.num_nodes)
        nodes = "\n".join(
            f"NodeName={node} NodeHostname={host} NodeAddr={address} Port={port} Sockets=1 "
            "CoresPerSocket=8 ThreadsPerCore=1 RealMemory=16000 "
            f"Gres=gpu:h100:{self.num_gpus} State=UNKNOWN"
            for node, port in zip(self._nodes(), ports[1:], strict=True)
        )
        return f"""\
ClusterName=ci
SlurmctldHost={host}({address})
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
# The credential's life is also the wait before a requeued job starts; 5 is the least.
AuthInfo=socket={self.root}/run/munge.socket,cred_expire=5
{communication}
StateSaveLocation={self.root}/state
SlurmdSpoolDir={self.root}/spool/%n
SlurmctldPidFile={self.root}/run/slurmctld.pid
SlurmdPidFile={self.root}/run/slurmd.%n.pid
SlurmctldLogFile={self.root}/log/slurmctld.log
SlurmdLogFile={self.root}/log/slurmd.%n.log
SlurmctldDebug=verbose
MailProg=/bin/true
MpiDefault=none
PlugStackConfig={self.root}/etc/plugstack.conf
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
# Nodes may say that they have more cores than this machine.
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
ReturnToService=2
# Refuse what can never run instead of queuing it for ever.
EnforcePartLimits=ALL
KillWait={KILL_WAIT_SECONDS}
MinJobAge=600
{nodes}
PartitionName=ci Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
PartitionName=low Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=10
"""


def _address() -> tuple[str, str]:
    """Where the daemons listen: the address of the host's name, which they bind whatever is
    configured, or all addresses where the name has none that is of use."""
    try:
        address = socket.gethostbyname(socket.gethostname())
    except OSError:
        address = ""
    if address and (not address.startswith("127.") or address == "127.0.0.1"):
        return address, "CommunicationParameters=NoInAddrAny,NoCtldInAddrAny"
    return "127.0.0.1", ""


def _free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for probe in sockets:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in sockets]


def sweep() -> None:
    """End what a killed test session left: its jobs outlive its daemons."""
    for root in Path("/tmp").glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError, ValueError):
            owner = int((root / "owner").read_text())
            if not Path(f"/proc/{owner}").exists():
                _kill_all_of(root / "etc" / "slurm.conf")
                shutil.rmtree(root, ignore_errors=True)


def _kill_all_of(conf: Path) -> None:
    """kill -9 of the processes whose environment names this configuration."""
    for process in _processes_with(f"SLURM_CONF={conf}".encode()):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def _processes_with(variable: bytes) -> Sequence[int]:
    found = []
    for folder in Path("/proc").iterdir():
        if re.fullmatch(r"\d+", folder.name) and int(folder.name) != os.getpid():
            with contextlib.suppress(OSError):
                if variable in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
    return found

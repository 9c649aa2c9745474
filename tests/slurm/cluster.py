"""A private Slurm on this machine: munged, slurmctld and two slurmd "nodes" on loopback, gone when the test ends.

Nothing of the host is configured or changed: own configuration directory, keys, ports and spool. Each slurmd runs
in its own UTS, mount and PID namespace, so ranks see two host names, and ending a node ends whatever it started.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
NODES = ("n1", "n2")
GPUS_PER_NODE = 8
"""Character devices that nothing can compute on: enough for Slurm to schedule a `--gpus-per-node=8` header."""

_FINAL_STATES = tuple("BOOT_FAIL CANCELLED COMPLETED DEADLINE FAILED NODE_FAIL OUT_OF_MEMORY PREEMPTED TIMEOUT".split())
"""Of a job; the many others pass, and are seen for moments alone, such as SIGNALING while a signal is sent."""

_SLURM_CONF = """\
ClusterName=nrt
SlurmctldHost=ctl(127.0.0.1)
SlurmctldPort={ctl_port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={dir}/munge.socket,cred_expire=10
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={dir}/state
SlurmdSpoolDir={dir}/spool-%n
SlurmctldPidFile={dir}/slurmctld.pid
SlurmdPidFile={dir}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=bf_interval=2,sched_min_interval=100000
MpiDefault=none
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=5
MinJobAge=3600
SlurmdTimeout=10
GresTypes=gpu
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE
"""


def missing_requirement() -> str:
    """Why a private Slurm cannot run here ('' when it can). Installs Debian's packages where that is harmless."""
    if os.geteuid() != 0:
        return "needs root for slurmd, host names and namespaces"
    probe = ["unshare", "--uts", "--mount", "--pid", "--fork", "--mount-proc", "true"]
    if shutil.which("unshare") is None or subprocess.run(probe, capture_output=True).returncode != 0:
        return "this machine does not allow new namespaces (unshare)"
    with tempfile.TemporaryDirectory() as scratch:
        try:
            _fake_gpus(Path(scratch) / "dev")
        except PermissionError:
            return "this machine does not allow device nodes (mknod)"
    if all(shutil.which(name) for name in ("slurmctld", "slurmd", "sbatch", "munged")):
        return ""
    install = f"apt-get install -y --no-install-recommends {' '.join(PACKAGES)}"
    if shutil.which("apt-get") is None:
        return "needs Slurm and munge, and there is no apt-get to install them"
    if Path("/run/systemd/system").exists():  # there the packages would start services
        return f"needs Slurm and munge; on a machine with systemd install them yourself: {install}"
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["apt-get", "update", "-qq"], install.split()):
        done = subprocess.run(command, env=quiet, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    return "" if done.returncode == 0 else f"`{install}` failed: {done.stderr.strip().splitlines()[-1:]}"


@dataclass(frozen=True)
class Job:
    """What slurmctld says about a job."""

    id: str
    state: str
    exit_code: str
    """`CODE:SIGNAL` of the batch script."""
    restarts: int
    stdout: Path

    @property
    def ended(self) -> bool:
        """Whether the job has left the queue for good."""
        return self.state in _FINAL_STATES

    def log(self) -> str:
        """The batch script's output so far."""
        return self.stdout.read_text(errors="replace") if self.stdout.exists() else ""


class PrivateSlurm:
    """A context manager; `env` is what Slurm's commands need to talk to this cluster."""

    def __init__(self) -> None:
        self.dir = Path(tempfile.mkdtemp(prefix="nrt-slurm-"))
        self.env = {**os.environ, "SLURM_CONF": str(self.dir / "slurm.conf")}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> PrivateSlurm:
        try:
            self._configure()
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # Commands ---------------------------------------------------------------------------------------------------

    def run(self, *command: str, check: bool = True, timeout: float = 30) -> subprocess.CompletedProcess[str]:
        """One of Slurm's commands."""
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=timeout)
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done

    def submit(self, *args: str, cwd: Path, env: dict[str, str] | None = None) -> str:
        """`sbatch ARGS` in `cwd`; returns the job's id."""
        command = ["sbatch", "--parsable", *args]
        done = subprocess.run(
            command, cwd=cwd, env={**self.env, **(env or {})}, capture_output=True, text=True, timeout=30
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout.strip()

    def job(self, job_id: str) -> Job:
        """The job as it is now."""
        words = self.run("scontrol", "show", "job", "-o", job_id).stdout.split()
        fields = dict(word.split("=", 1) for word in words if "=" in word)
        restarts = int(fields["Restarts"])
        return Job(job_id, fields["JobState"], fields["ExitCode"], restarts, Path(fields["StdOut"]))

    def wait(self, job_id: str, timeout: float = 240) -> Job:
        """The job when it has ended; after `timeout` seconds an AssertionError with its log."""
        return self.wait_until(job_id, lambda job: job.ended, timeout)

    def wait_until(self, job_id: str, reached: Callable[[Job], bool], timeout: float = 240) -> Job:
        """The job as soon as `reached(job)` holds; fails when the job ends before, and after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while not reached(job := self.job(job_id)):
            late = time.monotonic() > deadline
            assert not late and not job.ended, f"{'timeout' if late else 'ended'}: {job}\n{job.log()}"
            time.sleep(0.2)
        return job

    def crash(self, node: str) -> None:
        """Power loss of a node: its slurmd and all its processes are gone at once; `start_node` brings it back."""
        self._kill(node)

    # Daemons ----------------------------------------------------------------------------------------------------

    def _configure(self) -> None:
        ports = _free_ports(1 + len(NODES))
        nodes = "\n".join(
            f"NodeName={name} NodeAddr=127.0.0.1 Port={port} CPUs=64 RealMemory=1000000 Gres=gpu:{GPUS_PER_NODE}"
            for name, port in zip(NODES, ports[1:])
        )
        self._write("slurm.conf", _SLURM_CONF.format(ctl_port=ports[0], dir=self.dir, nodes=nodes))
        _fake_gpus(self.dir / "dev")
        devices = f"{self.dir}/dev/gpu[0-{GPUS_PER_NODE - 1}]"
        self._write("gres.conf", f"NodeName={','.join(NODES)} Name=gpu File={devices}\n")
        names = " ".join(("localhost", "auth", "ctl", *NODES))
        self._write("hosts", f"127.0.0.1 {names}\n")
        (self.dir / "munge.key").write_bytes(os.urandom(1024))
        (self.dir / "munge.key").chmod(0o600)
        (self.dir / "state").mkdir()

    def _write(self, name: str, text: str) -> None:
        (self.dir / name).write_text(text)

    def _start(self) -> None:
        suffixes = {
            "socket": "socket",
            "key-file": "key",
            "pid-file": "pid",
            "seed-file": "seed",
            "log-file": "log",
        }
        files = " ".join(f"--{option}={self.dir}/munge.{suffix}" for option, suffix in suffixes.items())
        self._daemon("auth", f"munged --force --foreground --num-threads=1 {files}")
        _wait_for((self.dir / "munge.socket").exists, "munged", self._logs)
        self._daemon("ctl", "slurmctld -D")
        for node in NODES:
            self.start_node(node)
        _wait_for(self._all_idle, "two idle nodes", self._logs)

    def start_node(self, node: str) -> None:
        """Starts a slurmd."""
        self._daemon(node, f"slurmd -D -N {node}")

    def _daemon(self, host: str, command: str) -> None:
        """Runs it as a machine of its own: host name, processes, and the end of all of them with this process.

        The shell is the first process of its PID namespace: it collects what is orphaned there, and when it
        is killed the kernel ends the rest, daemonised or not.
        """
        boot = f"hostname {host}; mount --bind {self.dir}/hosts /etc/hosts; {command} & wait"
        namespaces = ["--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        with (self.dir / f"{host}.log").open("ab") as log:
            self._daemons[host] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "unshare", *namespaces, "bash", "-ec", boot],
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def _all_idle(self) -> bool:
        states = self.run("sinfo", "-h", "-N", "-o", "%T", check=False).stdout.split()
        return states == ["idle"] * len(NODES)

    def _logs(self) -> str:
        return "\n".join(f"--- {path.name}\n{path.read_text()[-2000:]}" for path in self.dir.glob("*.log"))

    def _kill(self, host: str) -> None:
        """Kills the namespace's first process; `unshare` ends when the kernel has ended all others in it."""
        unshare = self._daemons.pop(host)
        children = Path(f"/proc/{unshare.pid}/task/{unshare.pid}/children")
        for pid in children.read_text().split() if children.exists() else []:
            os.kill(int(pid), signal.SIGKILL)
        unshare.wait(timeout=10)

    def stop(self) -> None:
        """Ends every process of the cluster, jobs included, and removes its directory."""
        for host in reversed(list(self._daemons)):
            self._kill(host)
        shutil.rmtree(self.dir)

    def survivors(self) -> list[str]:
        """Command lines of processes that belong to the cluster: after `stop` there is none."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if f"SLURM_CONF={self.dir}/".encode() in (process / "environ").read_bytes():
                    found.append((process / "cmdline").read_text().replace("\0", " "))
            except OSError:  # it has just ended
                continue
        return found


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _fake_gpus(directory: Path) -> None:
    """Device nodes for gres.conf: /dev/null by another name. Raises PermissionError where none may be made."""
    directory.mkdir()
    for index in range(GPUS_PER_NODE):
        os.mknod(directory / f"gpu{index}", 0o20666, os.makedev(1, 3))


def _wait_for(reached: Callable[[], bool], what: str, logs: Callable[[], str], timeout: float = 20) -> None:
    deadline = time.monotonic() + timeout
    while not reached():
        assert time.monotonic() < deadline, f"no {what} after {timeout} s\n{logs()}"
        time.sleep(0.05)

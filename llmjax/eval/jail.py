"""The program that `sandbox.py` starts: it isolates its own process and then runs an untrusted program.

    python -I -S jail.py '{"folder": ..., "limits": {...}, "user": ...}' < program

It uses all isolation that the system permits: another user (if started as root), namespaces for network, processes,
mounts and users, a small tmpfs as the only place to write, Landlock, and resource limits. With "probe" it prints as JSON
which of them work, and runs nothing. It imports the standard library only.
"""

import ctypes
import json
import os
import resource
import signal
import struct
import sys

CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUTS = 0x00020000, 0x08000000, 0x04000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT = 1, 2, 4, 0x20
MS_BIND, MS_REC, MS_PRIVATE = 0x1000, 0x4000, 0x40000
INNER = 1000  # user and group of the program, as it sees them
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446  # the same numbers on every architecture
FILE_RIGHTS = (1 << 13) - 1  # of Landlock's first version: execute, read, write, make, remove
REFER, TRUNCATE, DEVICE = 1 << 13, 1 << 14, 1 << 15  # added by versions 2, 3 and 5
READ = 0b1101  # execute, read files, list folders
READABLE = ("/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache", "/etc/localtime", "/dev/urandom", "/dev/zero")

libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    """See the module."""
    given = json.loads(sys.argv[1])
    program = b"" if given.get("probe") else sys.stdin.buffer.read()
    folder, python = given["folder"], sys.executable
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    fences = namespaces(given["user"])
    if fences and mount_tmpfs(folder, given["limits"]["disk"]):
        fences.append("tmpfs")
    if "another user" in fences:
        python = bind_python(folder)
    child = os.fork()  # the first process of the namespace; when it ends, the kernel ends all others in it
    if child:
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        os._exit(code if code >= 0 else 128 - code)
    if "another user" in fences:
        os.setgroups([])
        os.setresgid(INNER, INNER, INNER)
        os.setresuid(INNER, INNER, INNER)
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.chdir(folder)
    with open("program.py", "wb") as file:
        file.write(program)
    fences += limits(given["limits"])
    if landlock(folder):
        fences.append("landlock")
    if given.get("probe"):
        os.write(1, json.dumps(fences).encode())
        os._exit(0)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    environment = {"HOME": folder, "TMPDIR": folder, "PYTHONHASHSEED": "0", "LANG": "C.UTF-8"}
    if "another user" in fences:  # a shared libpython is looked for at its installed path, which is hidden now
        environment["LD_LIBRARY_PATH"] = os.path.join(os.path.dirname(os.path.dirname(python)), "lib")
    os.execve(python, [python, "-I", "-S", os.path.join(folder, "program.py")], environment)


def prctl(option: int, value: int) -> None:
    """Set an attribute of this process."""
    libc.prctl(option, value, 0, 0, 0)


def namespaces(user: int) -> list[str]:
    """Enter namespaces for users, network, processes and mounts, if permitted: the names of what works.

    Args:
        user: the number outside of the user that runs the program; 0: the user who started this. Root must give another
            one, because the limit on processes does not hold for root.
    """
    ready, done = os.pipe(), os.pipe()
    helper = 0
    if user:  # only a process outside may map another user
        outer = os.getpid()
        helper = os.fork()
        if not helper:
            os.read(ready[0], 1)
            for name in ("uid_map", "gid_map"):
                with open(f"/proc/{outer}/{name}", "w") as file:
                    file.write(f"0 0 1\n{INNER} {user} 1\n")
            os.write(done[1], b"1")
            os._exit(0)
    found = ["network namespace", "process namespace"]
    own = os.geteuid(), os.getegid()
    if libc.unshare(CLONE_NEWUSER | CLONE_NEWNET | CLONE_NEWPID | CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWUTS):
        if helper:
            os.kill(helper, signal.SIGKILL)
            os.waitpid(helper, 0)
        return []
    if helper:
        os.write(ready[1], b"1")
        os.close(done[1])
        mapped = os.read(done[0], 1) == b"1"
        os.waitpid(helper, 0)
        return [*found, "another user"] if mapped else found
    for name, text in (("setgroups", "deny"), ("uid_map", f"{INNER} {own[0]} 1"), ("gid_map", f"{INNER} {own[1]} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    return found


def mount_tmpfs(folder: str, disk: int) -> bool:
    """Mount a file system in memory with so many bytes and few files: whether it worked."""
    libc.mount(b"none", b"/", None, ctypes.c_ulong(MS_REC | MS_PRIVATE), None)
    options = f"size={disk},nr_inodes=256,mode=0700,uid={INNER},gid={INNER}".encode()
    return libc.mount(b"tmpfs", folder.encode(), b"tmpfs", ctypes.c_ulong(MS_NOSUID | MS_NODEV), options) == 0


def bind_python(folder: str) -> str:
    """A path to Python for a user who may not read the folders above it."""
    inside, real = os.path.join(folder, ".python"), os.path.realpath(sys.executable)
    os.mkdir(inside, 0o755)
    target, flags = inside.encode(), MS_BIND | MS_REC
    if libc.mount(sys.base_prefix.encode(), target, None, ctypes.c_ulong(flags), None):
        return sys.executable
    libc.mount(None, target, None, ctypes.c_ulong(MS_BIND | MS_REMOUNT | MS_RDONLY | MS_NOSUID), None)
    return os.path.join(inside, os.path.relpath(real, os.path.realpath(sys.base_prefix)))


def limits(given: dict[str, int]) -> list[str]:
    """Limit the resources of this process and its children."""
    wanted = {
        resource.RLIMIT_AS: given["memory"],
        resource.RLIMIT_CPU: given["cpu_seconds"],
        resource.RLIMIT_FSIZE: given["disk"],
        resource.RLIMIT_NOFILE: given["files"],
        resource.RLIMIT_CORE: 0,
    }
    if hasattr(resource, "RLIMIT_NPROC"):
        wanted[resource.RLIMIT_NPROC] = given["processes"]
    for name, value in wanted.items():
        resource.setrlimit(name, (value, value))
    return ["resource limits"]


def landlock(folder: str) -> bool:
    """Permit reading only the system's libraries and Python, and writing only to the folder: whether it worked."""
    version = libc.syscall(LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1)
    if version < 1:
        return False
    rights = FILE_RIGHTS
    rights |= (REFER if version >= 2 else 0) | (TRUNCATE if version >= 3 else 0) | (DEVICE if version >= 5 else 0)
    network = 3 if version >= 4 else 0  # bind and connect of TCP
    scope = 3 if version >= 6 else 0  # abstract Unix sockets and signals
    attributes = struct.pack("QQQ", rights, network, scope)[: 8 if version < 4 else 16 if version < 6 else 24]
    ruleset = libc.syscall(LANDLOCK_CREATE, attributes, ctypes.c_size_t(len(attributes)), 0)
    if ruleset < 0:
        return False
    prefixes = {sys.prefix, sys.base_prefix, sys.exec_prefix, os.path.dirname(os.path.realpath(sys.executable))}
    allowed = [(path, READ) for path in (*READABLE, *prefixes)] + [(folder, rights), (os.devnull, 0b110)]
    for path, access in allowed:
        if not os.path.exists(path):
            continue
        if not os.path.isdir(path):
            access &= 0b111 | TRUNCATE  # the rights of a file
        handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = struct.pack("=Qi", access & rights, handle)
        libc.syscall(LANDLOCK_ADD, ruleset, 1, rule, 0)
        os.close(handle)
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    return libc.syscall(LANDLOCK_RESTRICT, ruleset, 0) == 0


if __name__ == "__main__":
    main()

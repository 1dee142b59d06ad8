"""Measures a command: its time from start to end, the CPU time and the memory of all its processes."""
import os
import pathlib
import platform
import resource
import signal
import subprocess
import threading
import time

SAMPLE_SECS = 0.1


def measured(command, environment, seconds_allowed, log, folder, samples_memory=False):
    """Runs `command` in `folder`; what it prints goes to the file `log`.

    `peak_mib` is the larger of two: the proportional set size summed over the process and its descendants, sampled, and
    the resident set of the largest of them as the kernel kept it, where that is not this program's own, which it begins with.
    Sampling walks all their pages and takes time away from large processes: it is for runs whose time does not count, and
    without it there is only the second.
    """
    with open(log, "wb") as output:
        begin = time.perf_counter()
        process = subprocess.Popen(list(map(str, command)), env={**os.environ, **environment}, stdin=subprocess.DEVNULL,
                                   stdout=output, stderr=output, cwd=folder, start_new_session=True)
        ended, peak = threading.Event(), [0]
        sampler = threading.Thread(target=sample, args=(process.pid, ended, peak))
        killer = threading.Timer(seconds_allowed, os.killpg, (process.pid, signal.SIGKILL))
        killer.start()
        if samples_memory:
            sampler.start()
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - begin
        process.returncode = os.waitstatus_to_exitcode(status)
        killer.cancel(), ended.set()
        if samples_memory:
            sampler.join()
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak.append(usage.ru_maxrss if usage.ru_maxrss > own else 0)
    return {"seconds": seconds, "cpu_seconds": usage.ru_utime + usage.ru_stime, "peak_mib": max(peak) / 1024,
            "exit_code": process.returncode}


def why(exit_code, log):
    """How a process ended, and the last line that it printed."""
    end = signal.Signals(-exit_code).name if exit_code < 0 else f"exit code {exit_code}"
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return f"{end}, and last: {lines[-1] if lines else 'nothing'}"


def sample(pid, ended, peak):
    while not ended.wait(SAMPLE_SECS):
        peak[0] = max(peak[0], sum(map(proportional_kib, family(pid))))


def family(pid):
    """The process and its descendants."""
    try:
        children = [int(child) for task in os.listdir(f"/proc/{pid}/task")
                    for child in pathlib.Path(f"/proc/{pid}/task/{task}/children").read_text().split()]
    except OSError:  # it has just ended
        return []
    return [pid] + [member for child in children for member in family(child)]


def proportional_kib(pid):
    try:
        lines = pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def read_through(path):
    """Reads a file, so that it lies in the page cache for everyone."""
    with open(path, "rb") as file:
        while file.read(1 << 24):
            pass


def in_turn(names, number):
    """The names, beginning with another one each round."""
    first = number % len(names)
    return names[first:] + names[:first]


def hardware():
    cpu = next(line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name"))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cores = len(os.sched_getaffinity(0))
    return {"cpu": cpu, "cores": cores, "memory_gib": round(memory / 2**30, 1), "system": platform.platform()}

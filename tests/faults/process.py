"""Processes to be disturbed: the commands, a server of a language model, and a clock that can be moved.

A command is started in one of two ways. `fork`: its own `main` runs in a child of this process, which has done the imports already; that is what
`python -m` does, in a fifth of the time. `shell`: `python -m chroma_moe...` for real. Everything that happens to it comes from outside."""
import io, json, mmap, os, resource, select, shutil, signal, socket, struct, subprocess, sys, time, traceback
from configparser import ConfigParser
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).parents[2]
_ini = ConfigParser(delimiters=['=']); _ini.read(ROOT/'settings.ini', encoding='utf-8')
SCRIPTS = dict(e.split('=') for e in _ini['DEFAULT']['console_scripts'].split())
def module(command): return SCRIPTS[command].partition(':')[0]

def preload(commands):
    "Import what the children will need; none of it may start a thread."
    os.environ['PYTHONPATH'] = str(ROOT)
    for c in commands: import_module(module(c))
    import accelerate, bm25s # noqa: F401, imported by the commands when they need them
    from chroma_moe.monitor import new_figure
    fig = new_figure(2, 2); fig.subplots(2, 1)[0].set_title('fonts'); fig.savefig(io.BytesIO(), format='png')  # what a first picture has to load

LAUNCH = '-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no -m'.split()
def children(pid):
    "The processes that a process has started."
    try: return [*map(int, Path(f'/proc/{pid}/task/{pid}/children').read_text().split())]
    except FileNotFoundError: return []

def memory(pid='self'):
    "Size and largest size of a process, in bytes."
    return [int(line.split()[1])*1024 for line in Path(f'/proc/{pid}/status').read_text().splitlines() if line.startswith(('VmPeak','VmSize'))][::-1]

def _main(command, words, said):
    "Run a command to its end, as the interpreter would; return the exit code."
    f,(size,_) = getattr(import_module(module(command)), command),memory()
    try: f.main(words); return 0
    except SystemExit as e:
        if isinstance(e.code, str): print(e.code, file=sys.stderr)
        return e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException: traceback.print_exc(); return 1
    finally: said.with_suffix('.grown').write_text(str(memory()[1]-size))

class Run:
    "A command in a session of its own, or several ranks of it."
    def __init__(self, case, w, said, how='fork', more=(), env=None, limits=None, url=''):
        self.command,self.said,self.codes = case.command,said,{}
        with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
        line = [*case._replace(words=case.words.replace('{url}', url)).line(w), *more]
        n = 1 if how=='launch' else case.ranks
        for r in range(n):
            ranks = dict(RANK=r, LOCAL_RANK=r, WORLD_SIZE=n, LOCAL_WORLD_SIZE=n, MASTER_ADDR='127.0.0.1', MASTER_PORT=port) if n>1 else {}
            pid = os.fork()
            if not pid: self._become(case.command, line, said, how, {**ranks, **(env or {})}, limits or {})
            self.codes[pid] = None
        self.pids = [*self.codes]; self.began = time.monotonic()

    def _become(self, command, line, said, how, env, limits):
        code = 99
        try:
            os.setsid(); os.environ.update({k: str(v) for k,v in env.items()})
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            for fd in (1,2): os.dup2(os.open(said, os.O_WRONLY|os.O_CREAT|os.O_APPEND), fd)
            for kind,value in limits.items():
                if kind=='RLIMIT_AS': value += memory()[0]
                resource.setrlimit(getattr(resource, kind), (value, resource.RLIM_INFINITY))
            start = dict(shell=['-m'], launch=LAUNCH).get(how)
            if start: os.execve(sys.executable, [sys.executable, *start, module(command), *line], os.environ)
            code = _main(command, line, said)
            sys.stdout.flush(); sys.stderr.flush()
        finally: os._exit(code)

    def sentence(self):
        "The line in which the command refuses, or ''."
        return next((line for line in reversed(self.said.read_text().splitlines()) if line.startswith(f'{self.command}: ')), '')

    def running(self, seconds=0.):
        "The processes that still run when so many seconds are over, or earlier where all have ended."
        until = time.monotonic()+seconds
        while True:
            left = [p for p,c in self.codes.items() if c is None]
            if not left: return []
            fd = os.pidfd_open(left[0])
            try: ended = select.select([fd], [], [], max(0, until-time.monotonic()))[0]
            finally: os.close(fd)
            for p in left:
                done,status = os.waitpid(p, os.WNOHANG)
                if done: self.codes[p] = os.waitstatus_to_exitcode(status)
            if not ended: return [p for p,c in self.codes.items() if c is None]

    def kill(self, number=signal.SIGKILL, pids=None):
        for p in self.running():
            if pids is None or p in pids: os.kill(p, number)

    def end(self, seconds=300):
        "Wait for the end, or make one; the exit codes of all ranks, None for one that had to be ended."
        codes = [self.codes[p] for p in self.pids] if not self.running(seconds) else None
        for p in self.pids:
            until = time.monotonic()+5
            with suppress(ProcessLookupError):             # none is left of what they started
                while time.monotonic()<until: os.killpg(p, signal.SIGKILL); self.running(); time.sleep(.005)
        self.running(10)
        return codes or [None]*len(self.pids)

CLOCK = r'''
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
static volatile long *ahead;                       /* seconds, in a file that the one who moves the clock writes */
__attribute__((constructor)) static void begin(void) {
    int f = open(getenv("FAULTS_CLOCK"), O_RDONLY);
    void *p = f < 0 ? MAP_FAILED : mmap(0, 8, PROT_READ, MAP_SHARED, f, 0);
    if (p != MAP_FAILED) ahead = p;
}
int clock_gettime(clockid_t id, struct timespec *t) {
    int r = syscall(SYS_clock_gettime, id, t);
    if (!r && id == CLOCK_REALTIME && ahead) t->tv_sec += *ahead;
    return r;
}
int gettimeofday(struct timeval *t, void *z) {
    struct timespec s; int r = clock_gettime(CLOCK_REALTIME, &s);
    t->tv_sec = s.tv_sec; t->tv_usec = s.tv_nsec / 1000; return r;
}
time_t time(time_t *out) {
    struct timespec s; clock_gettime(CLOCK_REALTIME, &s);
    if (out) *out = s.tv_sec;
    return s.tv_sec;
}
'''

def with_clock(folder):
    "Start this program again under a clock that `move_clock` moves, where there is a C compiler; does it run under one?"
    if 'FAULTS_CLOCK' in os.environ: return True
    if not (cc := shutil.which('cc')): return False
    source,library,ahead = folder/'clock.c',folder/'clock.so',folder/'ahead'
    source.write_text(CLOCK); ahead.write_bytes(bytes(8))
    subprocess.run([cc, '-shared', '-fPIC', '-O1', '-o', library, source], check=True)
    os.execve(sys.executable, sys.orig_argv, os.environ|dict(LD_PRELOAD=str(library), FAULTS_CLOCK=str(ahead)))

def move_clock(seconds):
    "Move the clock of every child, at once."
    with open(os.environ['FAULTS_CLOCK'], 'r+b') as f: f.write(struct.pack('q', int(seconds)))

class _Server(ThreadingHTTPServer):
    daemon_threads,parent = True,os.getpid()
    def service_actions(self):
        if os.getpid()!=self.parent and os.getppid()!=self.parent: os._exit(0)            # it ends with the one who started it

class Writer:
    "The server of a language model in a process of its own; after `allow` requests it drops every connection in the middle of its answer."
    def __init__(self):
        self.left = mmap.mmap(-1, 8)
        self.http = _Server(('127.0.0.1', 0), self._handler(self.left)); self.url = f'http://127.0.0.1:{self.http.server_port}/v1'
        self.allow(1<<40)
        self.pid = os.fork()
        if not self.pid: self.http.serve_forever()
        self.http.server_close()

    def allow(self, requests): self.left[:] = struct.pack('q', requests)
    def close(self): os.kill(self.pid, signal.SIGKILL); os.waitpid(self.pid, 0)

    @staticmethod
    def _handler(left):
        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args): pass
            def do_POST(self):
                words = json.loads(self.rfile.read(int(self.headers['Content-Length'])))['messages'][0]['content'].split()
                n = struct.unpack('q', left[:])[0]; left[:] = struct.pack('q', n-1)
                said = json.dumps([' '.join(words[i:i+6]) for i in (-9,-18,-27)])                  # the same for the same text
                choice,usage = dict(message=dict(content=said), finish_reason='stop'),dict(prompt_tokens=9, completion_tokens=9)
                body = json.dumps(dict(choices=[choice], usage=usage)).encode()
                self.send_response(200); self.send_header('Content-Length', str(len(body))); self.end_headers()
                self.wfile.write(body if n>0 else body[:len(body)//2])
        return Handler

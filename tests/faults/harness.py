"A trial: start a command, do something to it, look at what stands, start it again, and compare the end with that of an undisturbed run."
import hashlib, os, pickle, shutil, signal, subprocess, time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

from .cases import CASES, MADE, Case, write_inputs
from .process import ROOT, Run, Writer, children, move_clock, preload
from .states import check, content, differences, on_disk, without_times

@dataclass
class End:
    "What an undisturbed run leaves, how long it takes, and how much memory it adds."
    content:dict; exact:set; seconds:float; grown:int

@dataclass
class Injection:
    "One disturbance, and what was seen."
    case:str; fault:str; how:str
    moment:float                # share of the undisturbed run, or of the room or memory that it needs
    hit:bool = False            # did it meet a command that was running, or keep one from its end?
    codes:list = field(default_factory=list); said:str = ''
    found:list = field(default_factory=list) # what was wrong before it was started again
    clean:bool = True           # started again, did it go on, or say in a sentence what to do?
    equal:bool = True           # was the end that of the undisturbed run?

class Ground:
    "The inputs, and the end of every undisturbed run; made once in a folder, which later campaigns of the same code use again."
    def __init__(self, home, cases):
        self.home,self.n,self.place = home,0,home.parent/'trial'/'w'                 # all runs write to one place, which some of them note down
        made,code = home/'made',hashlib.sha256(b''.join(p.read_bytes() for p in sorted((ROOT/'chroma_moe').glob('*.py')))).hexdigest()
        if not made.exists() or made.read_text()!=code: shutil.rmtree(home, ignore_errors=True); home.mkdir(parents=True); write_inputs(home)
        os.chdir(home); preload({c.command for c in CASES.values()}); self.writer = Writer()
        if not made.exists():
            for command,words in MADE: self.undisturbed(Case(command, words), home)
            made.write_text(code)
        self.ends = {c: self._end(c) for c in cases}

    def start(self, case, w, **kw):
        self.n += 1; said = self.home/f'said{self.n%100}'; said.write_text('')
        return Run(case, w, said, url=self.writer.url, **kw)

    def undisturbed(self, case, w):
        "Run to the end; how long it took, and by how much its memory grew."
        r = self.start(case, w)
        if r.end()!=[0]*case.ranks: raise SystemExit(f'an undisturbed run of {case.command} failed:\n{r.said.read_text()}')
        return time.monotonic()-r.began, int(r.said.with_suffix('.grown').read_text())

    def prepare(self, name):
        "A new place, with a file of somebody else and what is to be replaced; what it holds."
        w,(source,_,there) = self.place,CASES[name].before.partition(':')
        if w.is_mount(): subprocess.run(['umount', '-l', w], check=True)               # of a campaign that was ended in the middle
        shutil.rmtree(w.parent, ignore_errors=True); w.mkdir(parents=True); (w/'notes.txt').write_text('not ours')
        if source: subprocess.run(['cp', '-r', self.home/source, w/(there or source)], check=True); shutil.rmtree(w/there/'checkpoints', ignore_errors=True)
        return content(w)

    def _end(self, name):
        path = self.home/'whole'/f'{name}.pickle'
        if not path.exists():
            two = []
            for _ in range(2): self.prepare(name); cost = self.undisturbed(CASES[name], self.place); two.append((content(self.place), *cost))
            (a,quick,_),(b,other,grown) = two
            exact = {n for n in a if a[n]==b.get(n)}
            odd = [n for n in a if n not in exact|FREE and 'checkpoints/' not in n and without_times(n, a[n])!=without_times(n, b.get(n, b''))]
            if odd or a.keys()!=b.keys(): raise SystemExit(f'{name}: two undisturbed runs differ in {odd or a.keys()^b.keys()}')
            path.parent.mkdir(exist_ok=True); path.write_bytes(pickle.dumps(End(b, exact, min(quick, other), grown)))
        return pickle.loads(path.read_bytes())

RESUME,RESUMED = ['--resume'],{'chroma_bag','chroma_pretrain','chroma_tune'}
FREE = {'demo/report.html','demo/stages.json'} # they hold times: that they are there and whole is all that is asked of them
MAY_DIFFER = {                                 # by what was done
    'term': {'run/metrics.jsonl','run/routing.png'},                    # a run that is asked to end writes one line more, at the step where it ends
    'wandb': {'run/config.yaml','run/README.md','run/about.json'}}      # they name the setting
YEAR = 365*86400

def traced(said): return ['a traceback: '+said.strip().splitlines()[-1][:160]] if 'Traceback' in said else []

class Trial:
    "One case in one place, and what happens to it."
    def __init__(self, ground, name, fault, rng, how, lead=0.):
        self.g,self.name,self.case,self.end,self.fault,self.rng,self.how,self.lead = ground,name,CASES[name],ground.ends[name],fault,rng,how,lead
        self.w,self.done,self.finished,self.free = ground.place,[],False,MAY_DIFFER.get(fault, set())

    def run(self) -> list:
        "Do it; the injections, with what was found."
        self.before = self.g.prepare(self.name)
        getattr(self, f'do_{self.fault}')()
        if not self.finished: self.finish()
        return [asdict(i) for i in self.done]

    def start(self, more=(), **kw): return self.g.start(kw.pop('case', self.case), self.w, more=more, **dict(how=self.how)|kw)
    def resume(self): return RESUME if self.case.command in RESUMED and (self.w/'run'/'checkpoints').exists() else ()
    def draw(self): return self.rng.random()
    def wait(self, r, share):
        "Wait until so much of the time of an undisturbed run is over; what runs then."
        return r.running(.7*self.lead+share*self.end.seconds)

    def note(self, r, moment, hit):
        "Look at what a run said and left; the injection, with what is wrong."
        said,codes = r.said.read_text(),[r.codes[p] for p in r.pids]
        i = Injection(self.name, self.fault, self.how, round(moment, 3), bool(hit), codes, said[-1500:])
        if self.case.ranks==1: i.found += traced(said)
        if any(c and c>0 and c!=128+signal.SIGTERM for c in codes) and self.case.ranks==1 and not r.sentence(): i.found.append('it ended without a sentence')
        if None in codes: i.found.append('it did not end')
        i.found += check(self.w, self.end.content, self.before, self.end.exact-self.free)
        self.done.append(i); return i

    def refused(self, r, moment, must=False):
        "A run that should not come to its end."
        codes = r.end(); i = self.note(r, moment, any(codes))
        if must and not any(codes): i.found.append('it ended well, though it could not')
        return i

    def finish(self):
        "Run the same command until it is done, with what it asks for, and compare."
        more,again,self.finished = (),[],True
        for _ in range(4):
            r = self.start(more, how='fork'); codes = r.end(); said = r.said.read_text(); again += traced(said)
            if codes==[0]*self.case.ranks or 'already holds' in said or ' exists: ' in said: break                # the last two: it was complete
            if '--resume' in said and not more: more = RESUME; continue
            again.append(f'{codes} {said.strip()[-200:]}'); break
        end = differences(self.w, self.end.content, self.end.exact, FREE|self.free)
        for i in self.done: i.clean,i.equal = not again,not end
        self.done[-1].found += [f'again: {a}' for a in again] + end

    # what is done to it

    def do_kill(self, number=signal.SIGKILL):
        "Up to four times, each time while it goes on."
        for _ in range(self.rng.randint(1, 4)):
            share,r = self.draw(),self.start(self.resume()); left = self.wait(r, share)
            r.kill(number); r.running(60)
            i = self.note(r, share, left)
            if left and number==signal.SIGTERM and not {*i.codes}<={0, -number, 128+number}: i.found.append(f'it ended with {i.codes}')
            if not left or not any(i.codes): return                                      # it is complete

    def do_term(self): self.do_kill(signal.SIGTERM)

    def do_rank(self):
        "One of two is killed: the other must end by itself, and soon."
        share,r = self.draw(),self.start(); left = self.wait(r, share); one = self.rng.choice(r.pids)
        r.kill(signal.SIGKILL, [one]); late = r.running(60); r.end(0)
        i = self.note(r, share, len(left)==2)
        if late: i.found.append('the other process went on for a minute')

    def do_launch(self):
        "The same under `accelerate launch`: the launcher must end, and take all with it."
        share,r = self.draw(),self.start(how='launch')
        while len(ranks := children(r.pids[0]))<2 and r.running(.05): pass
        r.running(self.lead+share*self.end.seconds); hit = len(ranks := children(r.pids[0]))==2
        if hit: os.kill(self.rng.choice(ranks), signal.SIGKILL)
        late = r.running(90); alive = [p for p in ranks if os.path.exists(f'/proc/{p}/exe')]; r.end(0)
        i = self.note(r, share, hit); i.how = 'launch'
        if late or alive: i.found.append('a process was left')
        if hit and not any(i.codes): i.found.append('the launcher ended well')

    @contextmanager
    def disk(self, size):
        "A disk of its own below the place."
        def mount(*options): subprocess.run(['mount', *options, self.w], check=True, capture_output=True)
        aside = self.w.with_name('aside'); self.w.rename(aside); self.w.mkdir(); mount('-t', 'tmpfs', '-o', f'size={size}', 'tmpfs')
        try: shutil.copytree(aside, self.w, dirs_exist_ok=True); yield mount
        finally: subprocess.run(['umount', '-l', self.w], check=True)

    def do_disk(self):
        "Too small, and still too small; then there is room."
        shares,need,there = sorted(1.1*self.draw() for _ in range(3)),on_disk(self.end.content),on_disk(self.before)
        with self.disk(4096+there) as mount:
            for share in shares:
                mount('-o', f'remount,size={4096+there+int(share*max(0, need-there))}')
                if not any(self.refused(self.start(self.resume()), share).codes): break
            mount('-o', 'remount,size=1g'); self.finish()

    def do_readonly(self):
        "Killed; then nothing can be written for a while."
        share = self.draw()
        with self.disk('1g') as mount:
            r = self.start(); self.wait(r, share); r.kill(); r.end(10)
            mount('-o', 'remount,ro'); self.refused(self.start(self.resume()), share); mount('-o', 'remount,rw'); self.finish()

    def do_fsize(self):
        "No file may grow beyond a size, then beyond a larger one."
        most = max(map(len, self.end.content.values()))
        for share in sorted(self.draw() for _ in range(2)):
            if not any(self.refused(self.start(self.resume(), limits=dict(RLIMIT_FSIZE=int(share*most))), share).codes): break

    def do_blocked(self):
        "A file stands where the folder should be."
        aside = self.w.with_name('aside'); self.w.rename(aside); self.w.write_text('in the way')
        codes = (r := self.start()).end(); unchanged = self.w.read_text()=='in the way'; self.w.unlink(); aside.rename(self.w)
        i = self.note(r, 0, any(codes))
        if not any(codes) or not unchanged: i.found.append('it did not leave the file in the way alone')

    def do_memory(self):
        "It may add no more than a share of the memory that it needs, then a larger share."
        for share in sorted(self.draw()**3 for _ in range(2)):
            if not any(self.refused(self.start(self.resume(), limits=dict(RLIMIT_AS=int(share*self.end.grown))), share).codes): break

    def do_clock(self):
        "The clock jumps while it runs; perhaps it is then killed, and the clock jumps back."
        share,r,jump = self.draw(),self.start(),self.rng.choice([-1,1])*10**self.rng.uniform(1, 8.5); left = self.wait(r, share); move_clock(jump)
        if kill := self.draw()<.5: r.running(self.draw()*(1-share)*self.end.seconds); r.kill()
        codes = r.end(); i = self.note(r, share, left)
        if not kill and any(codes): i.found.append('it did not end well')
        if kill: move_clock(-jump)
        self.finish(); move_clock(0)

    def do_times(self):
        "Killed; then every file is of another time."
        share,r = self.draw(),self.start(); left = self.wait(r, share); r.kill(); r.end(10)
        for p in [self.w, *self.w.rglob('*')]: os.utime(p, (t := self.rng.choice([0, 60*YEAR, time.time()-YEAR, time.time()+YEAR]), t))
        self.note(r, share, left)

    def do_twice(self):
        "The same command once more, at some moment of the first, which is sometimes killed then."
        share,a = self.draw(),self.start(); left = self.wait(a, share); b = self.start(self.resume())
        if self.draw()<.3: self.wait(a, self.draw()); a.kill()
        b.end(); a.end(); i = self.note(b, share, left); other = self.note(a, share, False); self.done.pop(); i.found += other.found

    def do_cut(self):
        "The server drops its connections from some request on."
        share = self.draw(); self.g.writer.allow(int(160*share)); self.refused(self.start(), share, must=True); self.g.writer.allow(1<<40)

    def do_wandb(self):
        "W&B is asked for and out of reach: training must not notice."
        r = self.start(['--set','wandb.enabled=true'], env=dict(WANDB_API_KEY='0'*40, WANDB_BASE_URL='http://127.0.0.1:9')); codes = r.end()
        shutil.rmtree(self.w/'run'/'wandb', ignore_errors=True); i = self.note(r, 0, True)
        if any(codes): i.found.append('it did not end well')

    def do_hub(self):
        "A model, or a data set, of a hub that is out of reach."
        words = self.case.words.replace('--model base', '--model nobody/nothing').replace('--source texts.jsonl', '--source edgar')
        away = dict.fromkeys(('HTTPS_PROXY','HTTP_PROXY','https_proxy','http_proxy'), 'http://127.0.0.1:9')|dict(HF_HUB_OFFLINE='0', NO_PROXY='', no_proxy='')
        self.refused(self.start(case=self.case._replace(words=words), how='shell', env=away|dict(HF_HOME=str(self.w.with_name('hub')))), 0, must=True)

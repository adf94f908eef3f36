"Headless Chromium over its DevTools socket: as much as the site tests need."
import json, shutil, subprocess, tempfile, time, urllib.request
from pathlib import Path

from websocket import create_connection

FLAGS = '''--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update
--disable-sync --hide-scrollbars --disable-dev-shm-usage --remote-debugging-port=0'''.split()

def find(): return next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)

class Chrome:
    "One page in one fresh browser."
    def __init__(self):
        self.home,self.events,self.last = tempfile.mkdtemp(),[],0
        self.process = subprocess.Popen([find(), *FLAGS, f'--user-data-dir={self.home}', 'about:blank'],
                                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        port_file,end = Path(self.home)/'DevToolsActivePort',time.time()+60
        while not (port_file.exists() and '\n' in port_file.read_text()):
            if self.process.poll() is not None or time.time()>end: raise RuntimeError(f'{find()} did not start')
            time.sleep(.1)
        pages = json.load(urllib.request.urlopen(f'http://127.0.0.1:{port_file.read_text().split()[0]}/json', timeout=30))
        page = next(p for p in pages if p['type']=='page')
        self.socket = create_connection(page['webSocketDebuggerUrl'], suppress_origin=True, timeout=60)
        for domain in ('Page','Runtime','Log','Network'): self.send(f'{domain}.enable')

    def receive(self):
        message = json.loads(self.socket.recv())
        if 'method' in message: self.events.append(message)
        return message

    def send(self, method, **params):
        self.last += 1
        self.socket.send(json.dumps(dict(id=self.last, method=method, params=params)))
        while (message := self.receive()).get('id')!=self.last: pass
        if 'error' in message: raise RuntimeError(f'{method}: {message["error"]}')
        return message['result']

    def js(self, code):
        "The value of a JavaScript expression; a promise is awaited."
        r = self.send('Runtime.evaluate', expression=code, awaitPromise=True, returnByValue=True)
        if 'exceptionDetails' in r: raise RuntimeError(f'{code}: {r["exceptionDetails"]}')
        return r['result'].get('value')

    def size(self, width, height): self.send('Emulation.setDeviceMetricsOverride', width=width, height=height, deviceScaleFactor=1, mobile=False)

    def open(self, address, width=1300, height=900):
        "Load a page, wait until it is drawn, and return the events on the way."
        self.events = []
        self.size(width, height)
        self.send('Page.navigate', url=address)
        while not any(e['method']=='Page.loadEventFired' for e in self.events): self.receive()
        self.js('window.MathJax?.startup?.promise?.then(() => 1)')
        return self.events

    def wait(self, code, seconds=10):
        "Wait until a JavaScript expression holds."
        end = time.time()+seconds
        while not (value := self.js(code)) and time.time()<end: time.sleep(.05)
        return value

    def close(self):
        self.socket.close(); self.process.terminate(); self.process.wait(30)
        shutil.rmtree(self.home, ignore_errors=True)

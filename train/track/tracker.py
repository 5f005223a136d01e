"""draft"""
from __future__ import annotations
import json, os
from dataclasses import dataclass
from typing import Any
from pathlib import Path
@dataclass(frozen=True)
class RunInfo:
    id: str; name: str; directory: Path; attempt: int; wandb_id: str; config: dict[str, Any]; code: dict[str, Any]; unit: str; total_steps: int; start_step: int; global_batch_size: int
class Tracker:
    def __init__(self, config, run, *, is_main):
        self.on, self.run = is_main, run
        if is_main:
            p = run.directory/"metrics.jsonl"
            rows = []
            if p.exists():
                for l in p.read_text().splitlines():
                    try: r=json.loads(l)
                    except ValueError: continue
                    if r["step"]<=run.start_step: rows.append(l)
            p.write_text("".join(r+"\n" for r in rows))
            self.f = p.open("a")
    def log(self, step, m):
        if self.on:
            self.f.write(json.dumps({"step":step,"attempt":self.run.attempt,**m})+"\n"); self.f.flush()
            print(step, {k:round(v,4) for k,v in m.items()}, flush=True)
    def progress(self, step): pass
    def report(self, step, items):
        if self.on: print({k:v for k,v in items.items() if isinstance(v,str)})
    def histograms(self, step, v): pass
    def say(self, t):
        if self.on: print(t, flush=True)
    warn = say
    def flush(self, step):
        if self.on: os.fsync(self.f.fileno())
    def summary(self, v): pass
    def close(self): pass

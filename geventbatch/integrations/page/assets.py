"""The page's style, its script, and the headers that let in nothing else."""

from __future__ import annotations

from base64 import b64encode
from hashlib import sha256
from typing import Final

STYLE: Final = """
:root { color-scheme: light dark; --ink: #1d2733; --quiet: #56616d; --line: #d5dbe1; --paper: #fff; --tile: #f3f6f9;
  --bar: #2f74c0; --bad: #a3290b; --good: #1e6b35; }
@media (prefers-color-scheme: dark) { :root { --ink: #e3e8ee; --quiet: #9fabb8; --line: #36414d; --paper: #14191f;
  --tile: #1e252d; --bar: #5d9fe6; --bad: #ff8d6e; --good: #7bcf93; } }
body { font: .9rem/1.45 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 80rem;
  margin: 1.25rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; margin: 0; } h2 { font-size: 1.15rem; margin: 1.5rem 0 .5rem; overflow-wrap: anywhere; }
h3 { font-size: .95rem; margin: 1rem 0 .3rem; } header p { margin: .2rem 0 0; }
small, header p, figcaption, .quiet, dt, th { color: var(--quiet); font-weight: normal; }
header b { color: var(--ink); }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .5rem; margin: 0 0 .75rem; }
dl div { background: var(--tile); border-radius: .35rem; padding: .4rem .7rem; }
dt, th, figcaption, .quiet { font-size: .8rem; }
dd { margin: 0; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
dd small { font-size: .8rem; margin-left: .2rem; }
figure { margin: 0; } figure svg { width: 100%; height: 3.5rem; border-bottom: 1px solid var(--line); display: block; }
svg { fill: var(--bar); } .bar { width: 100%; min-width: 3rem; height: .6rem; background: var(--tile); display: block; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(22rem, 1fr)); gap: 0 1.75rem; }
table { border-collapse: collapse; width: 100%; } .wide { overflow-x: auto; }
th, td { text-align: left; padding: .15rem .6rem .15rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td:last-child, th:last-child { padding-right: 0; } .columns td { vertical-align: middle; }
.columns td:last-child { width: 25%; }
.wide td:last-child { width: 55%; }
.k { min-width: 8rem; } td:first-child { min-width: 5rem; }
.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
code, pre, summary { font: .8rem/1.4 ui-monospace, monospace; overflow-wrap: anywhere; unicode-bidi: isolate; }
pre { margin: .2rem 0; white-space: pre-wrap; } summary { cursor: pointer; }
.bad { color: var(--bad); } .good { color: var(--good); margin: .75rem 0 0; }
button { font: inherit; position: absolute; top: 1rem; right: 1rem; }
#stale { color: var(--bad); } .stale main { opacity: .5; }
"""

SCRIPT: Final = """
"use strict";
const button = document.createElement("button");
const stale = document.createElement("p");
let paused = false;
stale.id = "stale";
stale.setAttribute("role", "status");
button.textContent = "Pause";
button.addEventListener("click", () => {
  paused = !paused;
  button.textContent = paused ? "Go on" : "Pause";
});
document.body.prepend(button, stale);

async function look() {
  const answer = await fetch(location.href, {cache: "no-store", redirect: "error", signal: AbortSignal.timeout(5000)});
  if (!answer.ok) throw new Error(`the server answered ${answer.status}`);
  const fresh = new DOMParser().parseFromString(await answer.text(), "text/html").querySelector("main");
  if (!fresh) throw new Error("the server answered with another page");
  for (const open of document.querySelectorAll("main details[open]")) {
    const same = fresh.querySelector(`#${open.id}`);
    if (same) same.open = true;
  }
  document.querySelector("main").replaceWith(fresh);
}

async function watch() {
  // Text that is being selected, to be copied, stays.
  if (!paused && !document.hidden && getSelection().isCollapsed) {
    try {
      await look();
      document.body.classList.remove("stale");
      stale.textContent = "";
    } catch (error) {
      document.body.classList.add("stale");
      stale.textContent = `These numbers are old: ${error.message}.`;
    }
  }
  setTimeout(watch, 1000);
}

setTimeout(watch, 1000);
"""


def _hash(text: str) -> str:
    return f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"


_POLICY: Final = (
    f"default-src 'none'; script-src {_hash(SCRIPT)}; style-src {_hash(STYLE)}; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

HEADERS: Final = (
    ("Cache-Control", "no-store"),
    ("Content-Security-Policy", _POLICY),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Referrer-Policy", "no-referrer"),
    ("X-Content-Type-Options", "nosniff"),
    ("X-Frame-Options", "DENY"),
)

BEFORE: Final = (
    '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    '<meta name="robots" content="noindex"><title>Batches</title>'
    '<noscript><meta http-equiv="refresh" content="5"></noscript>'
    f"<style>{STYLE}</style></head><body><main>"
)

AFTER: Final = f"</main><script>{SCRIPT}</script></body></html>"

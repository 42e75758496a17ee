"""The site is built without a warning, and its reference shows what there is."""

from __future__ import annotations

import html
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from geventbatch import Batch, scopes
from geventbatch._options import DEFAULTS

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.site, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> str:
    site = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "docs", str(site)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return (site / "api.html").read_text()


def test_the_reference_shows_the_options_of_a_processor_with_their_defaults(reference: str) -> None:
    (shown,) = re.findall(r'<dt [^>]*id="geventbatch\.Processor">.*?</dt>', reference, re.DOTALL)
    text = re.sub(r"\s+", "", html.unescape(re.sub("<[^>]+>", "", shown)))
    options = ",".join(f"{name}={described(default)}" for name, default in DEFAULTS.items())
    assert f"(*,{options},)" in text


def test_the_reference_shows_what_users_see_of_a_batch(reference: str) -> None:
    found = re.findall(r'id="geventbatch\.Batch\.(\w+)"', reference)
    assert sorted(found) == sorted(name for name in dir(Batch) if not name.startswith("_"))


def test_the_reference_shows_every_protocol_of_scopes_and_stores(reference: str) -> None:
    found = re.findall(r'id="geventbatch\.scopes\.(\w+)"', reference)
    assert sorted(found) == sorted(scopes.__all__)


def test_no_signature_of_the_reference_hides_options_or_shows_an_address(reference: str) -> None:
    shown = [one for one in signatures(reference).values() if re.search(r"\*\*|<|objectat", one)]
    # Huey's own options, and those of the Processor that a bench makes.
    assert shown == ["consume(huey,*,workers=100,**options)", "processor(store,/,**options)"]


@pytest.mark.parametrize(
    "owner",
    [
        "Processor",
        "stores.sqlalchemy.SQLAlchemyStore.documents",
        "stores.sqlalchemy.SQLAlchemyStore.mapped",
        "stores.django.DjangoStore",
        "stores.redis.RedisStore",
        "stores.sql.SQLStore",
    ],
)
def test_the_entry_of_a_constructor_tells_of_each_option_in_its_signature(reference: str, owner: str) -> None:
    options = re.findall(r"(\w+)=", signatures(reference)[f"geventbatch.{owner}"])
    entry = reference.partition(f'id="geventbatch.{owner}">')[2].partition("</dt>")[2].partition("</dl>")[0]
    told = html.unescape(re.sub("<[^>]+>", "", entry))
    assert len(options) > 6
    assert [one for one in options if not re.search(rf"\b{one}\b", told)] == []


def signatures(page: str) -> dict[str, str]:
    """Return the signature of each entry of the reference, without blanks, and from the last part of its name on."""
    found = re.findall(r'<dt class="sig[^>]*id="([^"]+)">(.*?)</dt>', page, re.DOTALL)
    texts = {name: html.unescape(re.sub(r"<[^>]+>|\s+", "", shown)).rstrip("¶") for name, shown in found}
    return {name: text[text.find(f"{name.rpartition('.')[2]}(") :] for name, text in texts.items() if "(" in text}


def described(default: Any) -> str:
    """Return *default* as the reference shows it, without blanks."""
    if isinstance(default, tuple):
        return f"({','.join(map(described, default))}{',' * (len(default) == 1)})"
    return default.__name__ if callable(default) else repr(default)

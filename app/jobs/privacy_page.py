"""A privacy report as one page of HTML: nothing is loaded, nothing runs, and it can be printed and signed."""

import base64
import hashlib
from collections.abc import Iterable
from decimal import ROUND_CEILING, Context
from html import escape
from typing import Final

from isthmus.wire.privacy import DatasetPrivacy, PrivacyPlan, PrivacyReport, PrivacyUnit

HTML_MEDIA_TYPE: Final = "text/html"
STYLE: Final = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2rem; border-bottom: 1px solid #ccc; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1.2rem; }
dt { font-weight: 600; } dd { margin: 0; }
.guarantee { border-left: 4px solid #14663a; background: #eef7f1; padding: .8rem 1rem; }
.none { border-left: 4px solid #b00020; background: #fdecee; color: #b00020; padding: .8rem 1rem; font-weight: 600; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { border: 1px solid #ccc; padding: .35rem .5rem; text-align: left; vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
footer { margin-top: 3rem; font-size: .85rem; color: #555; }
@media print { body { margin: 0; max-width: none; } h2 { break-after: avoid; } tr, li { break-inside: avoid; } }
"""
_STYLE_DIGEST = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
CONTENT_SECURITY_POLICY: Final = (
    f"default-src 'none'; style-src 'sha256-{_STYLE_DIGEST}'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
"""Browsers take this page's own style and nothing else, whatever somebody may have named a job."""


def page_of(report: PrivacyReport) -> str:
    """The report as a whole document."""
    title = f"Privacy of the job {report.job!r}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        _facts(report),
        _promise(report),
        "<h2>How</h2>",
        _definitions(
            [
                ("Mechanism", report.mechanism),
                ("Two worlds that cannot be told apart", report.adjacency),
                ("How it is counted", report.accountant),
            ]
        ),
        "<h2>Each dataset</h2>",
        _table(report),
        _listed("What has to be true", report.assumptions),
        _listed("What is not protected", report.not_protected),
        _listed("What leaves a worker, and how it is charged", report.released),
        f"<footer>Report of job {report.job_id}. What was spent is counted by the datasets' ledgers; the ledger that "
        "each worker keeps is the authority for what it released.</footer>",
    ]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>\n<body>\n'
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _facts(report: PrivacyReport) -> str:
    unit = "none" if report.unit is PrivacyUnit.NONE else f"one {report.unit.value}"
    facts = [("Job", report.job), ("State", report.job_state.replace("_", " ")), ("What is protected", unit)]
    if report.where is not None:
        facts.append(("Where the noise is added", report.where.value))
    if report.unit is not PrivacyUnit.NONE:
        facts.append(("Delta", f"{report.delta:g}"))
        facts.append(("Organizations that may hold one person", f"{report.max_orgs_per_person:d}"))
    return _definitions(facts)


def _promise(report: PrivacyReport) -> str:
    kind = "none" if report.unit is PrivacyUnit.NONE else "guarantee"
    return f'<h2>The promise</h2>\n<p class="{kind}">{escape(report.guarantee)}</p>'


def _definitions(facts: Iterable[tuple[str, str]]) -> str:
    return f"<dl>{''.join(f'<dt>{escape(name)}</dt><dd>{escape(text)}</dd>' for name, text in facts)}</dl>"


def _listed(title: str, sentences: Iterable[str]) -> str:
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
    return f"<h2>{escape(title)}</h2>\n<ul>{items}</ul>"


def _table(report: PrivacyReport) -> str:
    if not report.datasets:
        return "<p>No dataset was asked yet.</p>"
    claims = report.unit is not PrivacyUnit.NONE
    head = ["Dataset", "State", "Declared records", "Rounds released", "Releases"]
    if claims:
        head[3:3] = ["Noise", "Epsilon of the whole job", "Spent until now", "For one person", "By loss distributions"]
    rows = "\n".join(_row(dataset, claims=claims) for dataset in report.datasets)
    titles = "".join(f'<th scope="col">{escape(title)}</th>' for title in head)
    return f"<table><thead><tr>{titles}</tr></thead>\n<tbody>{rows}</tbody></table>"


def _row(dataset: DatasetPrivacy, *, claims: bool) -> str:
    cells = [
        f"<td>{escape(f'{dataset.organization}/{dataset.dataset}')}</td>",
        f"<td>{escape(dataset.state)}</td>",
        _number(f"{dataset.declared_rows:d}"),
        _number(f"{dataset.rounds_released:d}"),
        _number(f"{dataset.releases:d}"),
    ]
    if claims:
        cells[3:3] = [
            f"<td>{escape(_noise(dataset.plan))}</td>",
            _number(_figure(None if dataset.plan is None else dataset.plan.epsilon)),
            _number(_figure(dataset.epsilon_spent)),
            _number(_figure(dataset.epsilon_person)),
            _number(_figure(dataset.epsilon_reference)),
        ]
    return f"<tr>{''.join(cells)}</tr>"


def _number(text: str) -> str:
    return f'<td class="number">{escape(text)}</td>'


_UPWARDS: Final = Context(prec=4, rounding=ROUND_CEILING)


def _figure(value: float | None) -> str:
    """An epsilon, rounded up: what is shown is never below what is promised."""
    if value is None:
        return "not known"
    return f"{float(_UPWARDS.create_decimal_from_float(value)):.4g}"


def _noise(plan: PrivacyPlan | None) -> str:
    if plan is None:
        return "not planned"
    if plan.unit is not PrivacyUnit.RECORD:
        return f"{plan.noise_multiplier:.4g} times the bound, each round"
    steps = "one step" if plan.steps_per_round == 1 else f"{plan.steps_per_round} steps"
    return (
        f"{plan.noise_multiplier:.4g} times the bound, each step; {steps} a round, each record in a step with "
        f"probability {plan.sampling_probability:.4g}"
    )

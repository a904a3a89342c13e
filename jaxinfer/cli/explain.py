"""`jaxinfer explain`: where the time of one request went."""

import json
from collections import defaultdict
from dataclasses import asdict

from rich.table import Table

from jaxinfer.cli.admin import WHERE, Where
from jaxinfer.cli.console import console
from jaxinfer.cli.options import Json


def explain(request_id: str, *, as_json: Json = False, where: Where = WHERE) -> None:
    """Says what happened to a request, step by step: a live one, or one of the last that ended.

    Parameters
    ----------
    request_id
        As its client has it; where the server has tenants, TENANT/REQUEST_ID.
    as_json
        Prints one JSON object.
    """
    with where.client() as client:
        happenings = client.explain(request_id)
    if as_json:
        rows = [asdict(one) for one in happenings]
        print(json.dumps({"request_id": request_id, "happenings": rows}))
        return
    table = Table("at ms", "took ms", "what", "how", "step", title=f"request {request_id}")
    spent: defaultdict[str, float] = defaultdict(float)
    for one in happenings:
        spent[one.kind] += one.seconds
        took = f"{1e3 * one.seconds:.2f}" if one.seconds else ""
        table.add_row(f"{1e3 * one.at_s:.2f}", took, one.kind, one.text, str(one.step))
    for column in (0, 1, 4):
        table.columns[column].justify = "right"
    out, total_s = console(120), sum(spent.values())
    out.print(table)
    parts = sorted((entry for entry in spent.items() if entry[1]), key=lambda entry: -entry[1])
    shares = ", ".join(f"{kind} {seconds / total_s:.1%}" for kind, seconds in parts)
    out.print(f"{1e3 * total_s:.2f} ms in all: {shares or 'nothing yet'}", highlight=False)

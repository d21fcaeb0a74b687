"""For mkdocs: where a page names another one, as docs/data.md, it becomes a link. In code it stays as it is."""

import re

NAMED = re.compile(r"(?<![`/\w\[(])(\(?)docs/(\w+\.md)(?![\w`\]])")


def on_page_markdown(markdown: str, **_: object) -> str:
    """The page with its links."""
    lines, fenced = [], False
    for line in markdown.splitlines():
        fenced ^= line.lstrip().startswith("```")
        prose = not fenced and not line.startswith("    ")
        lines.append(NAMED.sub(r"\1[docs/\2](\2)", line) if prose else line)
    return "\n".join(lines)

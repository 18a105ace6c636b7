"""Reads what `nbdev-test --timing` says, passes it on, and names the chapters that a reader would wait for.

    nbdev-test --timing | python workflow/chapter_times.py [--fail]

A chapter runs from top to bottom in under a minute on a laptop. Slower ones are named; with --fail (`make test-all`, on a machine that does nothing else) they are an error.
"""
import re
import sys

LIMIT = 60      # seconds


def slow(report, limit=LIMIT):
    "Chapters above the limit, slowest first: name -> seconds. Raises ValueError for a report without any."
    seconds = {name: int(s) for name, s in re.findall(r'^(\S+\.ipynb): (\d+) secs$', report, re.M)}
    if not seconds: raise ValueError('No chapter was timed. Expected lines such as 11_film.ipynb: 4 secs, as nbdev-test --timing prints them.')
    return {k: v for k, v in sorted(seconds.items(), key=lambda item: -item[1]) if v > limit}


def main(fail):
    report = ''
    for line in sys.stdin: print(line, end='', flush=True); report += line
    if 'Success.' not in report: return 1
    found = slow(report)
    if found: print(f'Above {LIMIT} s: {", ".join(f"{k} {v} s" for k, v in found.items())}. On a quiet machine a chapter takes less: shorten what it tries.')
    return int(bool(found) and fail)


if __name__ == '__main__': sys.exit(main('--fail' in sys.argv))

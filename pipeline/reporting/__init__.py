"""The report of a run, from one plain dict of results: figures, a page, a table on the terminal.

figures = make_figures(results)
write_page(results, figures, run_directory / "report.html")
print_report(results, Console())
"""

from pipeline.reporting.figures import make_figures
from pipeline.reporting.html import render_page, write_page
from pipeline.reporting.summary import headline
from pipeline.reporting.terminal import print_report
from pipeline.reporting.variant_columns import result_rows
from pipeline.results.schema import RunResults

__all__ = ["RunResults", "headline", "make_figures", "print_report", "render_page", "result_rows", "write_page"]

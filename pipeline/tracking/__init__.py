"""Where a run's parameters, metrics, figures and artifacts are recorded.

tracker = make_tracker(TrackingConfig(), run_directory)
with tracker.start_run("smollm2-135m") as run:
    run.log_params(config)
    with run.child("prior") as stage:
        stage.log_metrics({"seconds": 105.0})
print(*tracker.summary(), sep="\\n")

Records are written to a journal in the run's directory first and delivered to MLflow from there.
"""

from pipeline.tracking.factory import check_stores, make_tracker
from pipeline.tracking.local import LocalRecords
from pipeline.tracking.mlflow_store import default_uri
from pipeline.tracking.tracker import NoTracker, Run, Status, Tracker

__all__ = ["LocalRecords", "NoTracker", "Run", "Status", "Tracker", "check_stores", "default_uri", "make_tracker"]

"""One module a package: how its own call trains, predicts, saves and loads, on data made here.

Each has `DISTRIBUTION` (as pip names it), `FIELD`, `MODEL`, `METRIC` (lower is better), `INSTALL` (pip's arguments, one
tuple a call), `NO_STRATEGY` (why its call takes no strategy, or ``""``), and the functions ``train(callbacks, *,
strategy, devices)``, ``module_of(trained)``, ``predict(trained)``, ``score(trained)``, ``reload(trained, folder)``.
"""


def trainer_settings(callbacks, strategy, devices):
    """Return what every package's Trainer gets."""
    return {
        "accelerator": "cpu",
        "strategy": strategy,
        "devices": devices,
        "callbacks": callbacks,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }

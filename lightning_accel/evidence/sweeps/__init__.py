"""What the runs of a sweep show: settings with their noise, the trade-off between speed and a metric, a page."""

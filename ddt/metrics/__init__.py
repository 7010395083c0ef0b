"""Evaluation in three layers: images → features, features → statistics, statistics → metrics."""

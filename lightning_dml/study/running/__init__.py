"""Running the trainings of a study, each exactly once on however many workers."""

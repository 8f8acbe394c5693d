"""`lightning-dml study`: a grid of trainings on a shared storage, and what it shows. Importing it loads no torch."""

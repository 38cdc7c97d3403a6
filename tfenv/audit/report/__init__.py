"""The report for people who would rather look than read: one HTML page made from the records of logs."""

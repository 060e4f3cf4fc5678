"""The command ``marginops score``: scores and a selection of rows of Parquet files."""

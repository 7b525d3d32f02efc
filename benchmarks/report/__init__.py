"""The GPU report: its stages, the processes that they run in, their files, and the page that is made from them."""

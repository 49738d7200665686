//! Tables and random histories.

//! Programs that nobody here wrote move between two hosts with networks of their own,
//! by CRIU, under load and with the connections of their clients.

#[path = "programs/http.rs"]
mod http;
#[path = "programs/nginx.rs"]
mod nginx;
#[path = "programs/node.rs"]
mod node;
#[path = "programs/postgres.rs"]
mod postgres;
#[path = "programs/python.rs"]
mod python;
#[path = "programs/redis.rs"]
mod redis;
#[path = "programs/service.rs"]
mod service;

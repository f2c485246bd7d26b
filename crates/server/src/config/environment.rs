//! The variables of the environment that mean something, as layers of the configuration.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use figment::Figment;
use figment::value::Value;

use super::Host;
use super::layers::{Layer, refused};
use super::table::{KEYS, OTHER_VARIABLES, PREFIX, PROGRAMS_PREFIX, Shape};
use crate::Error;

/// Variables and their values, without the empty ones: that is how scripts and container files unset one.
pub(super) struct Environment(BTreeMap<String, String>);

impl Environment {
    /// Takes what is text; only a variable of ours must be.
    pub(super) fn of(host: &Host) -> Result<Environment, Error> {
        let mut variables = BTreeMap::new();
        for (name, value) in &host.environment {
            let Some(name) = name.to_str() else { continue };
            match value.to_str() {
                Some("") => {}
                Some(value) => {
                    variables.insert(name.to_owned(), value.to_owned());
                }
                None if name.starts_with(PREFIX) => {
                    return Err(Error::Setting {
                        key: name.to_owned(),
                        origin: variable(name),
                        problem: "is not UTF-8".to_owned(),
                        allowed: None,
                    });
                }
                None => {}
            }
        }
        Ok(Environment(variables))
    }

    pub(super) fn text(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }

    /// A directory after the XDG base directory specification, which wants relative paths ignored.
    pub(super) fn directory(&self, variable: &str, below_home: &str) -> Option<PathBuf> {
        let named = self
            .text(variable)
            .map(PathBuf::from)
            .filter(|path| path.is_absolute());
        named.or_else(|| {
            self.text("HOME")
                .map(|home| Path::new(home).join(below_home))
        })
    }

    /// Ours by name, and nothing.
    pub(super) fn unknown(&self) -> Vec<String> {
        let known = |name: &str| {
            OTHER_VARIABLES.contains(&name)
                || name.starts_with(PROGRAMS_PREFIX)
                || KEYS
                    .iter()
                    .any(|key| key.variable() == name || key.also.contains(&name))
        };
        self.0
            .keys()
            .filter(|name| name.starts_with(PREFIX) && !known(name))
            .cloned()
            .collect()
    }

    /// Merges a layer for each variable that is there.
    pub(super) fn merge(&self, mut figment: Figment) -> Result<Figment, Error> {
        if let Some(port) = self.text("API_PORT") {
            figment = with_port(figment, port)?;
        }
        for key in &KEYS {
            let ours = key.variable();
            // The first name wins: a variable with our prefix is meant for us.
            let mut names = [ours.as_str()].into_iter().chain(key.also.iter().copied());
            let Some(name) = names.find(|name| self.0.contains_key(*name)) else {
                continue;
            };
            let text = &self.0[name];
            let value = match &key.shape {
                Shape::Text
                | Shape::Word(_)
                | Shape::Cpus
                | Shape::Range
                | Shape::Ranges
                | Shape::Interface
                | Shape::Servers
                | Shape::Admin
                | Shape::Provider => Some(Value::from(text.clone())),
                Shape::Flag => flag(text).map(Value::from),
                Shape::Number(_) => text.trim().parse::<u64>().ok().map(Value::from),
            };
            let value = value.ok_or_else(|| Error::Setting {
                key: key.path.to_owned(),
                origin: variable(name),
                problem: "cannot be read".to_owned(),
                allowed: Some(key.shape.allowed()),
            })?;
            figment = figment.merge(Layer::one(variable(name), key.path, value));
        }
        for (name, path) in &self.0 {
            let Some(runtime) = name.strip_prefix(PROGRAMS_PREFIX) else {
                continue;
            };
            let key = format!(
                "runtime.programs.{}",
                runtime.to_lowercase().replace('_', "-")
            );
            figment = figment.merge(Layer::one(variable(name), &key, path.clone()));
        }
        Ok(figment)
    }
}

fn variable(name: &str) -> String {
    format!("environment variable {name}")
}

/// Changes only the port of what is to be listened on.
fn with_port(figment: Figment, text: &str) -> Result<Figment, Error> {
    let port: u16 = text.trim().parse().map_err(|_| Error::Setting {
        key: "listen".to_owned(),
        origin: variable("API_PORT"),
        problem: "cannot be read".to_owned(),
        allowed: Some("a whole number from 0 to 65535".to_owned()),
    })?;
    let mut listen: SocketAddr = figment.extract_inner("listen").map_err(refused)?;
    listen.set_port(port);
    Ok(figment.merge(Layer::one(
        variable("API_PORT"),
        "listen",
        listen.to_string(),
    )))
}

fn flag(text: &str) -> Option<bool> {
    match text.trim().to_ascii_lowercase().as_str() {
        "true" | "1" | "yes" | "on" => Some(true),
        "false" | "0" | "no" | "off" => Some(false),
        _ => None,
    }
}

//! What we write into a Caddy's configuration, and what we take out of it again. Pure.
//!
//! Every object of ours has an `@id` that begins with `hutch_TAG_`: nothing else is ever changed. Objects that we had to
//! make around ours are marked in the same way, so that they can go again when nobody else uses them.
//!
//! ```text
//! apps.http.servers.hutch_TAG              a server for our names, when none listens on the port yet;
//! apps.http.servers.*.routes[0]            otherwise a route in each that does
//! apps.tls.automation.policies[0]          where certificates for our names come from
//! apps.tls.automation.on_demand            whom Caddy asks before it gets one; one value for all of Caddy
//! apps.pki.certificate_authorities.hutch_TAG   for names that no public authority knows
//! ```
//!
//! Nothing is written for single machines: Caddy drops all WebSockets whenever its configuration changes.

use std::path::PathBuf;

use serde_json::{Map, Value, json};

use super::{CaddyConfig, Foreign, Issuer};

/// All ids of all instances begin so.
const FAMILY: &str = "hutch_";
/// What the id of an object that is only around ours goes on with.
const AROUND: &str = "made_";
/// Caddy's ports when the configuration names none.
const PORTS: (u64, u64) = (80, 443);

type Object = Map<String, Value>;

/// How a Caddy is told whom to ask before it gets a certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Asking {
    /// `ask`: until it is gone (2.8 calls it deprecated).
    Ask,
    /// `permission`, since 2.8.
    Permission,
}

impl Asking {
    fn on_demand(self, url: &str) -> Value {
        match self {
            Self::Ask => json!({ "ask": url }),
            Self::Permission => json!({ "permission": { "module": "http", "endpoint": url } }),
        }
    }

    /// What this `on_demand` asks.
    fn url(on_demand: &Value) -> Option<&str> {
        let permission = &on_demand["permission"];
        let http = permission["module"] == "http";
        let endpoint = http.then(|| permission["endpoint"].as_str()).flatten();
        on_demand["ask"].as_str().or(endpoint)
    }
}

/// The name of our certificate authority, and of our server in Caddy.
pub(super) fn name(tag: &str) -> String {
    format!("{FAMILY}{tag}")
}

/// Where our names are served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Through {
    /// A server of our own.
    Ours,
    /// Servers of somebody else, which have that port.
    Theirs,
}

/// `current` with our part as it should be.
pub(super) fn put(
    current: &Value,
    config: &CaddyConfig,
    asking: Asking,
) -> Result<(Value, Through), Foreign> {
    let ours = Ours::new(config);
    let on_demand = current["apps"]["tls"]["automation"]["on_demand"].clone();
    let mut root = current.clone();
    if take_out(&mut root, &ours.prefix, Keep::Around) {
        root = Value::Null;
    }
    if !root.is_null() && !root.is_object() {
        let hint = "look at what `curl localhost:2019/config/` says";
        return Err(foreign("the configuration is no object", hint));
    }
    ours.check_policies(&root)?;
    let through = ours.put_routes(&mut root)?;
    ours.put_policy(&mut root)?;
    if config.issuer.is_on_demand() {
        ours.put_on_demand(&mut root, &on_demand, asking)?;
    }
    if matches!(config.issuer, Issuer::Internal) {
        let authorities = ["apps", "pki", "certificate_authorities"];
        let authority = json!({
            "@id": ours.id("ca"),
            "name": format!("Hutch {}", config.tag),
            // Caddy would put its root into the trust store of the host.
            "install_trust": false,
        });
        ours.object(&mut root, &authorities)?
            .insert(name(&config.tag), authority);
    }
    Ok((root, through))
}

/// `current` without anything of ours.
pub(super) fn remove(current: &Value, tag: &str) -> Value {
    let mut root = current.clone();
    match take_out(&mut root, &format!("{FAMILY}{tag}_"), Keep::Nothing) {
        true => Value::Null,
        false => root,
    }
}

/// Whether `current` may stay as it is, where `wanted` is what we would make of it. What counts is the same; but
/// several instances in one Caddy need not fight for who is the first.
pub(super) fn is_settled(current: &Value, wanted: &Value) -> bool {
    current == wanted || unordered(current) == unordered(wanted)
}

fn unordered(root: &Value) -> Value {
    fn sort(array: Option<&mut Value>) {
        let Some(array) = array.and_then(Value::as_array_mut) else {
            return;
        };
        let family = |value: &&Value| id(value).is_some_and(|id| id.starts_with(FAMILY));
        let leading = array.iter().take_while(family).count();
        array[..leading].sort_by(|a, b| id(a).cmp(&id(b)));
    }
    let mut root = root.clone();
    sort(root.pointer_mut("/apps/tls/automation/policies"));
    let servers = root.pointer_mut("/apps/http/servers");
    for server in servers.and_then(Value::as_object_mut).into_iter().flatten() {
        sort(server.1.get_mut("routes"));
    }
    root
}

/// What of ours stays when it is taken out.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Keep {
    Nothing,
    /// The marks of what we made around ours.
    Around,
}

fn id(value: &Value) -> Option<&str> {
    value.get("@id")?.as_str()
}

/// Takes ours out of `value`, and says whether nothing is left of it.
fn take_out(value: &mut Value, prefix: &str, keep: Keep) -> bool {
    if let Some(rest) = id(value).and_then(|id| id.strip_prefix(prefix))
        && !rest.starts_with(AROUND)
    {
        return true;
    }
    match value {
        Value::Array(items) => {
            let before = items.len();
            items.retain_mut(|item| !take_out(item, prefix, keep));
            keep == Keep::Nothing && items.is_empty() && before > 0
        }
        Value::Object(object) => {
            let gone: Vec<String> = object
                .iter_mut()
                .filter_map(|(key, value)| take_out(value, prefix, keep).then(|| key.clone()))
                .collect();
            for key in gone {
                object.remove(&key);
            }
            if !id_of(object).is_some_and(|id| id.starts_with(prefix)) {
                return false;
            }
            if keep == Keep::Nothing && object.len() > 1 {
                object.remove("@id");
            }
            // Not even empty ones: Caddy does something where a part is there, but says nothing.
            object.len() == 1 && object.contains_key("@id")
        }
        _ => false,
    }
}

fn id_of(object: &Object) -> Option<&str> {
    object.get("@id")?.as_str()
}

fn foreign(what: impl Into<String>, hint: impl Into<String>) -> Foreign {
    Foreign {
        what: what.into(),
        hint: hint.into(),
    }
}

struct Ours<'a> {
    config: &'a CaddyConfig,
    prefix: String,
    wildcard: String,
}

impl<'a> Ours<'a> {
    fn new(config: &'a CaddyConfig) -> Self {
        Self {
            config,
            prefix: format!("{FAMILY}{}_", config.tag),
            wildcard: format!("*.{}", config.domain),
        }
    }

    fn id(&self, part: &str) -> String {
        format!("{}{part}", self.prefix)
    }

    /// The object at a path, made where it is missing.
    fn object<'v>(&self, root: &'v mut Value, path: &[&str]) -> Result<&'v mut Object, Foreign> {
        let mut at = root;
        let mut key = "root";
        for next in path.iter().map(Some).chain([None]) {
            if at.is_null() {
                *at = json!({ "@id": self.id(&format!("{AROUND}{key}")) });
            }
            let Value::Object(object) = at else {
                let what = format!("`{key}` in Caddy's configuration is no object");
                return Err(foreign(what, "correct Caddy's configuration"));
            };
            match next {
                Some(next) => {
                    key = next;
                    at = object.entry(*next).or_insert(Value::Null);
                }
                None => return Ok(object),
            }
        }
        unreachable!("the chain ends with None")
    }

    /// The array `key` at a path, made where it is missing.
    fn array<'v>(
        &self,
        root: &'v mut Value,
        path: &[&str],
        key: &str,
    ) -> Result<&'v mut Vec<Value>, Foreign> {
        let value = self.object(root, path)?.entry(key);
        let value = value.or_insert_with(|| json!([]));
        if value.is_null() {
            *value = json!([]);
        }
        value.as_array_mut().ok_or_else(|| {
            let what = format!("`{key}` in Caddy's configuration is no array");
            foreign(what, "correct Caddy's configuration")
        })
    }

    fn route(&self, part: &str) -> Value {
        let upstream = format!("unix/{}", self.config.upstream.display());
        json!({
            "@id": self.id(part),
            "match": [{ "host": [self.wildcard] }],
            "terminal": true,
            "handle": [{ "handler": "reverse_proxy", "upstreams": [{ "dial": upstream }] }],
        })
    }

    fn put_routes(&self, root: &mut Value) -> Result<Through, Foreign> {
        let https_port = self.config.https_port;
        let http = &root["apps"]["http"];
        let ports = Ports::of(http);
        let theirs: Vec<(String, Value)> = http["servers"]
            .as_object()
            .into_iter()
            .flatten()
            .filter(|(_, server)| listens(server).any(|at| has_port(at, https_port)))
            .map(|(name, server)| (name.clone(), server.clone()))
            .collect();
        for (name, server) in &theirs {
            self.check_server(name, server, &ports)?;
        }
        let servers = ["apps", "http", "servers"];
        for (at, (name, _)) in theirs.iter().enumerate() {
            let path = [&servers[..], &[name]].concat();
            let route = self.route(&format!("route{at}"));
            self.array(root, &path, "routes")?.insert(0, route);
        }
        if !theirs.is_empty() {
            return Ok(Through::Theirs);
        }
        let listen: Vec<String> = match self.config.bind.as_slice() {
            [] => vec![format!(":{https_port}")],
            addresses => addresses
                .iter()
                .map(|ip| std::net::SocketAddr::new(*ip, https_port).to_string())
                .collect(),
        };
        let server = json!({
            "@id": self.id("server"),
            "listen": listen,
            "routes": [self.route("route")],
            "automatic_https": { "disable_redirects": !self.config.redirect },
            // TLS, whatever Caddy would conclude from the port.
            "tls_connection_policies": [{}],
        });
        let name = name(&self.config.tag);
        let servers = self.object(root, &servers)?;
        if servers.insert(name.clone(), server).is_some() {
            let what = format!("a server {name:?} that does not carry our mark");
            return Err(foreign(what, "remove it or give it another name"));
        }
        Ok(Through::Ours)
    }

    /// Whether our route can go into a server of somebody else without changing what that does.
    fn check_server(&self, name: &str, server: &Value, ports: &Ports) -> Result<(), Foreign> {
        let https_port = self.config.https_port;
        let other_port = "or give the gateway another HTTPS port, or a Caddy of its own";
        for host in hosts(server) {
            let label = host
                .strip_suffix(&self.config.domain)
                .and_then(|rest| rest.strip_suffix('.'));
            if label.is_some_and(|label| !label.contains('.')) {
                let what = format!("server {name:?} has a site {host}, which is below our domain");
                return Err(foreign(what, "remove that site, or choose another domain"));
            }
        }
        if !ports.is_tls(server) {
            let what = format!("server {name:?} on port {https_port} does not speak TLS");
            return Err(foreign(what, format!("end it {other_port}")));
        }
        let automatic = &server["automatic_https"];
        if ["disable", "disable_certificates"]
            .iter()
            .any(|key| automatic[key] == true)
        {
            let what = format!("server {name:?} on port {https_port} gets no certificates");
            let hint = format!("let it have automatic HTTPS, {other_port}");
            return Err(foreign(what, hint));
        }
        let policies = server["tls_connection_policies"].as_array();
        let picky = |policy: &Value| {
            !matches!(&policy["match"], Value::Null) && policy["match"] != json!({})
        };
        if policies.is_some_and(|all| !all.is_empty() && all.iter().all(picky)) {
            let what = format!("server {name:?} has TLS policies for names of its own only");
            let hint = format!("add an empty TLS connection policy as its last one, {other_port}");
            return Err(foreign(what, hint));
        }
        Ok(())
    }

    fn check_policies(&self, root: &Value) -> Result<(), Foreign> {
        let subject = Value::from(self.wildcard.as_str());
        let taken = policies(root).any(|policy| {
            let subjects = policy["subjects"].as_array();
            subjects.is_some_and(|subjects| subjects.contains(&subject))
        });
        if taken {
            let what = format!("a TLS automation policy for {}", self.wildcard);
            return Err(foreign(what, "remove it, or choose another domain"));
        }
        Ok(())
    }

    fn put_policy(&self, root: &mut Value) -> Result<(), Foreign> {
        let mut policy = json!({
            "@id": self.id("policy"),
            "subjects": [self.wildcard],
            "issuers": [self.issuer()],
        });
        if self.config.issuer.is_on_demand() {
            policy["on_demand"] = true.into();
        }
        let automation = ["apps", "tls", "automation"];
        // The first that fits counts, and one without subjects fits everything.
        self.array(root, &automation, "policies")?.insert(0, policy);
        Ok(())
    }

    fn issuer(&self) -> Value {
        let (acme, provider) = match &self.config.issuer {
            Issuer::Internal => {
                return json!({ "module": "internal", "ca": name(&self.config.tag) });
            }
            Issuer::Acme(acme) => (acme, None),
            Issuer::WildcardDns { acme, provider } => (acme, Some(provider)),
        };
        let mut issuer = json!({ "module": "acme" });
        if let Some(email) = &acme.email {
            issuer["email"] = email.as_str().into();
        }
        if let Some(directory) = &acme.directory {
            issuer["ca"] = directory.as_str().into();
        }
        if !acme.trusted_roots.is_empty() {
            let files = acme.trusted_roots.iter();
            let files: Vec<_> = files
                .map(|path: &PathBuf| path.display().to_string())
                .collect();
            issuer["trusted_roots_pem_files"] = files.into();
        }
        if let Some(provider) = provider {
            issuer["challenges"] = json!({ "dns": { "provider": provider } });
        }
        issuer
    }

    /// `before` is what was there, ours or not.
    fn put_on_demand(
        &self,
        root: &mut Value,
        before: &Value,
        asking: Asking,
    ) -> Result<(), Foreign> {
        let ask = self.config.ask_url.as_str();
        let own = "let the gateway have a Caddy of its own, or certificates by another way";
        let policies_of_others = policies(root)
            .filter(|policy| !id(policy).is_some_and(|id| id.starts_with(FAMILY)))
            .any(|policy| policy["on_demand"] == true);
        let automation = self.object(root, &["apps", "tls", "automation"])?;
        match automation.get("on_demand") {
            Some(theirs) if !theirs.is_null() => match Asking::url(theirs) {
                // Whoever wrote it wants the same.
                Some(url) if url == ask => Ok(()),
                Some(url) => {
                    let what = format!("Caddy already asks {url} about certificates on demand");
                    let hint = format!("make it ask {ask}, which is one for all, or {own}");
                    Err(foreign(what, hint))
                }
                None => {
                    let what = "Caddy already has settings for certificates on demand";
                    let hint = format!("make it ask {ask}, which is one for all, or {own}");
                    Err(foreign(what, hint))
                }
            },
            _ if policies_of_others => {
                let what = "other names get certificates on demand, and nobody is asked";
                let hint = format!("make Caddy ask {ask}, which is one for all, or {own}");
                Err(foreign(what, hint))
            }
            _ => {
                // One that Caddy has taken stays in its form.
                let taken = [Asking::Ask, Asking::Permission].into_iter().find(|form| {
                    let mut form = form.on_demand(ask);
                    form["@id"] = self.id("on_demand").into();
                    form == *before
                });
                let mut on_demand = taken.unwrap_or(asking).on_demand(ask);
                on_demand["@id"] = self.id("on_demand").into();
                automation.insert("on_demand".into(), on_demand);
                Ok(())
            }
        }
    }
}

fn policies(root: &Value) -> impl Iterator<Item = &Value> {
    let policies = root["apps"]["tls"]["automation"]["policies"].as_array();
    policies.into_iter().flatten()
}

fn listens(server: &Value) -> impl Iterator<Item = &str> {
    let listen = server["listen"].as_array().into_iter().flatten();
    listen.filter_map(Value::as_str)
}

/// The hosts that the routes of a server name.
fn hosts(server: &Value) -> impl Iterator<Item = &str> {
    fn items(value: &Value) -> impl Iterator<Item = &Value> {
        value.as_array().into_iter().flatten()
    }
    let matches = items(&server["routes"]).flat_map(|route| items(&route["match"]));
    let hosts = matches.flat_map(|one| items(&one["host"]));
    hosts.filter_map(Value::as_str)
}

/// The ports of an address: `tcp/127.0.0.1:8000-8010`, `:443`. None at sockets, and where placeholders stand.
fn port_range(listen: &str) -> Option<(u16, u16)> {
    if listen.starts_with("unix") || listen.starts_with("udp") {
        return None;
    }
    let (_, ports) = listen.rsplit_once(':')?;
    let (first, last) = ports.split_once('-').unwrap_or((ports, ports));
    Some((first.parse().ok()?, last.parse().ok()?))
}

fn has_port(listen: &str, port: u16) -> bool {
    port_range(listen).is_some_and(|(first, last)| (first..=last).contains(&port))
}

/// Caddy's ports for HTTP and HTTPS, from which it concludes what a server speaks.
struct Ports {
    http: u64,
    https: u64,
}

impl Ports {
    fn of(http: &Value) -> Self {
        let or = |key: &str, default| {
            http[key]
                .as_u64()
                .filter(|port| *port > 0)
                .unwrap_or(default)
        };
        Self {
            http: or("http_port", PORTS.0),
            https: or("https_port", PORTS.1),
        }
    }

    /// Whether a server speaks TLS already. One that does not would begin to, once it has a route for a host name
    /// (`automaticHTTPSPhase1` in Caddy's `autohttps.go`).
    fn is_tls(&self, server: &Value) -> bool {
        let only = |port: u64| {
            listens(server).all(|at| {
                let port = u16::try_from(port).unwrap_or_default();
                port_range(at) == Some((port, port))
            })
        };
        let policies = server["tls_connection_policies"].as_array();
        if policies.is_some_and(|policies| !policies.is_empty()) {
            return true;
        }
        if server["automatic_https"]["disable"] == true || only(self.http) {
            return false;
        }
        only(self.https) || hosts(server).next().is_some()
    }
}

#[cfg(test)]
mod tests;

//! The OpenAPI document beyond what handlers say: title, keys, and the errors that every route shares.

use hutch_contract::error::ErrorBody;
use utoipa::OpenApi as _;
use utoipa::openapi::path::Operation;
use utoipa::openapi::response::ResponseBuilder;
use utoipa::openapi::security::{ApiKey, ApiKeyValue, HttpAuthScheme, HttpBuilder, SecurityScheme};
use utoipa::openapi::{ContentBuilder, OpenApi, Ref};

/// The frame that the handlers' part is put into.
#[derive(utoipa::OpenApi)]
#[openapi(
    info(title = "Hutch", description = "MicroVMs over HTTP.", license(name = "Apache-2.0", identifier = "Apache-2.0")),
    components(schemas(ErrorBody)),
    security(("bearer" = []), ("key" = [])),
    tags(
        (name = "machines", description = "What you create, run commands in and delete. `{id}` is an id or a name."),
        (name = "snapshots", description = "Machines as they were at a moment: kept, restored, and copied."),
        (name = "ports", description = "How machines are reached from outside: ports of the host, and URLs."),
        (name = "exec", description = "Commands in machines."),
        (name = "processes", description = "Commands that go on by themselves: shells, servers. `{process}` is the id given at their start."),
        (name = "files", description = "Files in machines: raw bytes of any size."),
        (name = "images", description = "What machines are made from."),
        (name = "operations", description = "What takes long, and how far it is."),
        (name = "server", description = "The server itself."),
    ),
)]
struct Frame;

/// Statuses and what they mean here.
const ERRORS: [(&str, &str); 14] = [
    ("400", "The request cannot be meant so."),
    ("401", "No valid key was shown."),
    ("403", "The key may not do this."),
    ("404", "No such thing, or not this owner's."),
    ("408", "The body took too long to arrive."),
    ("409", "It does not fit the present state."),
    ("413", "The body is larger than the limit."),
    ("415", "The body has another type, or is compressed."),
    ("429", "The owner's quota is used up."),
    ("500", "A fault of the server."),
    ("501", "This runtime or guest cannot do it."),
    ("503", "Something it needs is not there now."),
    ("504", "It took longer than its deadline."),
    ("507", "The host has no room left."),
];

/// Puts the handlers' part into the frame.
pub(super) fn finish(described: OpenApi) -> OpenApi {
    let mut document = Frame::openapi();
    document.merge(described);
    let schemes = [
        (
            "bearer",
            SecurityScheme::Http(HttpBuilder::new().scheme(HttpAuthScheme::Bearer).build()),
        ),
        (
            "key",
            SecurityScheme::ApiKey(ApiKey::Header(ApiKeyValue::new("x-api-key"))),
        ),
    ];
    let components = document.components.get_or_insert_default();
    for (name, scheme) in schemes {
        components.add_security_scheme(name, scheme);
    }
    for (status, meaning) in ERRORS {
        let schema = Ref::from_schema_name("ErrorBody");
        let content = ContentBuilder::new().schema(Some(schema)).build();
        let response = ResponseBuilder::new()
            .description(meaning)
            .content("application/json", content);
        components
            .responses
            .insert(format!("Error{status}"), response.build().into());
    }
    for (path, item) in &mut document.paths.paths {
        let operations = [
            &mut item.get,
            &mut item.put,
            &mut item.post,
            &mut item.patch,
            &mut item.delete,
        ];
        for operation in operations.into_iter().flatten() {
            name(operation);
            add_errors(path, operation);
        }
    }
    document
}

/// Names an operation by its resource too: `list` alone would be several.
fn name(operation: &mut Operation) {
    let tag = operation.tags.iter().flatten().next();
    if let (Some(tag), Some(id)) = (tag, &mut operation.operation_id)
        && id != tag
    {
        *id = format!("{tag}_{id}");
    }
}

/// Adds the errors that a route can answer with, seen from its shape.
fn add_errors(path: &str, operation: &mut Operation) {
    let keyed = path.starts_with("/v1/");
    let body = operation.request_body.is_some();
    for (status, _) in ERRORS {
        let possible = match status {
            "500" => true,
            "408" | "413" | "415" => keyed && body,
            // Also in a body something can be named that is not there.
            "404" => keyed && (path.contains('{') || body),
            _ => keyed,
        };
        if possible {
            let response = Ref::new(format!("#/components/responses/Error{status}"));
            let responses = &mut operation.responses.responses;
            responses
                .entry(status.to_owned())
                .or_insert_with(|| response.into());
        }
    }
}

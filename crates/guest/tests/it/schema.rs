//! The schema never changes by accident: its descriptor as text is compared with a file.

use std::fmt::Write;
use std::path::Path;

use prost_types::{DescriptorProto, EnumDescriptorProto, FileDescriptorProto};

/// One line per thing that a released agent depends on, sorted.
fn render(file: &FileDescriptorProto) -> String {
    let mut lines = Vec::new();
    for service in &file.service {
        for method in &service.method {
            let streams = |streams: Option<bool>| {
                if streams.unwrap_or_default() {
                    "stream "
                } else {
                    ""
                }
            };
            lines.push(format!(
                "call {}.{}({}{}) returns ({}{})",
                service.name(),
                method.name(),
                streams(method.client_streaming),
                method.input_type(),
                streams(method.server_streaming),
                method.output_type()
            ));
        }
    }
    for message in &file.message_type {
        render_message(message, "", &mut lines);
    }
    for kind in &file.enum_type {
        render_enum(kind, "", &mut lines);
    }
    lines.sort();
    lines
        .iter()
        .fold(format!("package {}\n", file.package()), |mut text, line| {
            writeln!(text, "{line}").expect("a string takes everything");
            text
        })
}

fn render_message(message: &DescriptorProto, outer: &str, lines: &mut Vec<String>) {
    let name = format!("{outer}{}", message.name());
    for field in &message.field {
        let oneof = field
            .oneof_index
            .map(|index| message.oneof_decl[index as usize].name());
        let of = oneof.map_or(String::new(), |oneof| format!(" oneof {oneof}"));
        let kind = format!("{:?} {:?}", field.label(), field.r#type());
        lines.push(format!(
            "field {name} {:04} {} {kind} {}{of}",
            field.number(),
            field.name(),
            field.type_name()
        ));
    }
    for inner in &message.nested_type {
        render_message(inner, &format!("{name}."), lines);
    }
    for kind in &message.enum_type {
        render_enum(kind, &format!("{name}."), lines);
    }
}

fn render_enum(kind: &EnumDescriptorProto, outer: &str, lines: &mut Vec<String>) {
    let name = kind.name();
    let values = kind.value.iter();
    lines.extend(values.map(|v| format!("enum {outer}{name} {:04} {}", v.number(), v.name())));
}

#[test]
fn the_schema_is_the_one_in_the_golden_file() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("proto");
    let set = protox::compile(["agent.proto"], [&folder]).unwrap();
    let rendered = render(&set.file[0]);
    let golden = folder.join("agent.golden.txt");
    if std::env::var_os("UPDATE_GOLDEN").is_some_and(|value| value == "1") {
        std::fs::write(&golden, &rendered).unwrap();
    }
    let agreed = std::fs::read_to_string(&golden).unwrap();
    let changed: Vec<_> = agreed
        .lines()
        .filter(|line| !rendered.contains(line))
        .collect();
    assert!(
        changed.is_empty(),
        "released agents depend on these: {changed:#?}"
    );
    assert_eq!(
        rendered, agreed,
        "the schema grew: rewrite the file with UPDATE_GOLDEN=1"
    );
}

//! Progress on stderr: a bar or a spinner where a person watches, plain lines where a log is written.

use std::cell::RefCell;
use std::time::Duration;

use hutch_contract::operation::Progress;
use indicatif::{BinaryBytes, ProgressBar, ProgressStyle};

use crate::ui::{Ui, printable};

/// A bar over bytes; says nothing where nobody watches.
pub fn bytes(ui: Ui, name: &str, total: Option<u64>) -> ProgressBar {
    if !ui.watched() {
        return ProgressBar::hidden();
    }
    let (bar, template) = match total {
        Some(total) => (
            ProgressBar::new(total),
            "{msg} {wide_bar} {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta}",
        ),
        None => (
            ProgressBar::no_length(),
            "{msg} {binary_bytes} {binary_bytes_per_sec}",
        ),
    };
    bar.set_style(ProgressStyle::with_template(template).expect("the templates are constants"));
    bar.set_message(printable(name));
    bar
}

/// The steps of an operation.
pub struct Steps {
    ui: Ui,
    spinner: Option<ProgressBar>,
    phase: RefCell<String>,
}

impl Steps {
    /// Nothing is shown before the first step.
    pub fn new(ui: Ui) -> Steps {
        let spinner = ui.watched().then(|| {
            let spinner = ProgressBar::new_spinner();
            spinner.enable_steady_tick(Duration::from_millis(100));
            spinner
        });
        Steps {
            ui,
            spinner,
            phase: RefCell::default(),
        }
    }

    /// Shows how far it is; in a log each step stands once.
    pub fn show(&self, progress: Option<&Progress>) {
        let Some(progress) = progress else { return };
        match &self.spinner {
            Some(spinner) => spinner.set_message(printable(sentence(progress).trim_end())),
            None => {
                if *self.phase.borrow() != progress.phase {
                    self.ui.say(format!("  {}", printable(&progress.phase)));
                    self.phase.replace(progress.phase.clone());
                }
            }
        }
    }
}

impl Drop for Steps {
    fn drop(&mut self) {
        if let Some(spinner) = &self.spinner {
            spinner.finish_and_clear();
        }
    }
}

fn sentence(progress: &Progress) -> String {
    let Progress {
        phase,
        done,
        total,
        unit,
    } = progress;
    let amount = |count: u64| match unit.as_str() {
        "bytes" => BinaryBytes(count).to_string(),
        _ => count.to_string(),
    };
    let unit = if unit == "bytes" { "" } else { unit };
    match total {
        Some(total) => format!("{phase}: {} of {} {unit}", amount(*done), amount(*total)),
        None if *done > 0 => format!("{phase}: {} {unit}", amount(*done)),
        None => phase.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_reads_as_a_sentence() {
        let mut progress = Progress {
            phase: "unpack".to_owned(),
            done: 3,
            total: Some(9),
            unit: "packages".to_owned(),
        };
        assert_eq!(sentence(&progress), "unpack: 3 of 9 packages");
        progress = Progress {
            done: 2048,
            total: None,
            unit: "bytes".to_owned(),
            ..progress
        };
        assert_eq!(sentence(&progress).trim_end(), "unpack: 2.00 KiB");
        progress.done = 0;
        assert_eq!(sentence(&progress), "unpack");
    }
}

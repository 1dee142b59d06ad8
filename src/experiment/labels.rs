//! Reads labelled images: a folder with a folder per class, or a table of images with their classes or masks.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use image::DynamicImage;
use walkdir::WalkDir;

use super::{ExperimentError, images, one_class};
use crate::engine::inputs::{csv_line, csv_problem};
use crate::inference::{ModelCard, Task};

/// Images with what is right about them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Labelled {
    /// Where they come from.
    pub(super) path: PathBuf,
    pub(super) items: Vec<Item>,
    /// Number of groups; what is drawn for intervals.
    pub(super) groups: usize,
    /// Names of the groups; empty if each image is its own.
    pub(super) group_names: Vec<String>,
    /// Files in class folders that are no images.
    pub(super) others: Vec<String>,
}

/// One image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Item {
    pub(super) image: PathBuf,
    pub(super) truth: Truth,
    /// Index of its group, such as its patient.
    pub(super) group: usize,
}

/// What is right about an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Truth {
    /// Index of its class; of a model with one class [`one_class::NOT`] for what is not it.
    Class(usize),
    /// A grey picture of its size whose values are indices of classes, 255 for what has none.
    Mask(PathBuf),
    /// A grey picture of its size of a model with one class: 1 or 255 where that is, 0 elsewhere.
    Region(PathBuf),
}

impl Truth {
    /// The class of each pixel `[row, column]` of an image of that size, below `classes`, or 255 for none; empty of an
    /// image that has one class as a whole.
    pub(super) fn pixels(&self, size: (u32, u32), classes: usize) -> Result<Vec<u8>, ExperimentError> {
        match self {
            Self::Class(_) => Ok(Vec::new()),
            Self::Mask(path) => mask(path, size, classes),
            Self::Region(path) => region(path, size),
        }
    }
}

impl Labelled {
    /// Whether groups were named, rather than each image being its own.
    pub(super) fn has_groups(&self) -> bool {
        !self.group_names.is_empty()
    }

    pub(super) fn images(&self) -> Vec<PathBuf> {
        self.items.iter().map(|item| item.image.clone()).collect()
    }
}

/// Reads the labels for a model of that card; images are looked at when they are needed.
pub(super) fn read(path: &Path, card: &ModelCard) -> Result<Labelled, ExperimentError> {
    let wrong = |reason: &str| Err(ExperimentError::Labels { path: path.to_owned(), reason: reason.to_owned() });
    if card.task == Task::Features {
        return wrong("features have no classes to hold against labels");
    }
    let (items, group_names, others) = if path.is_dir() {
        if card.task == Task::Segmentation {
            return wrong("a folder per class has no masks; a segmentation needs a CSV with the columns path,mask");
        }
        let (items, others) = folder(path, card)?;
        (items, Vec::new(), others)
    } else {
        let (items, names) = table(path, card)?;
        (items, names, Vec::new())
    };
    if items.is_empty() {
        return wrong("holds no labelled image");
    }
    let is_of_first = |item: &Item| item.truth == Truth::Class(0);
    if card.task == Task::Classification && one_class::is_alone(card) && !items.iter().any(is_of_first) {
        return wrong(&format!("no image is labelled {:?}, the model's only class", card.classes[0].name));
    }
    let groups = items.iter().map(|item| item.group + 1).max().unwrap_or(0);
    Ok(Labelled { path: path.to_owned(), items, groups, group_names, others })
}

/// A mask with only indices below `classes` and 255 in it.
fn mask(path: &Path, size: (u32, u32), classes: usize) -> Result<Vec<u8>, ExperimentError> {
    let mask = grey(path, size)?;
    let is_none = |value: &&u8| usize::from(**value) >= classes && **value != u8::MAX;
    if let Some(value) = mask.iter().find(is_none) {
        let reason = format!("holds the value {value}, but there are classes 0 to {} (255: none)", classes - 1);
        return Err(labels_error(path, reason));
    }
    Ok(mask)
}

/// A mask of a model's only class, as indices of what is told apart.
fn region(path: &Path, size: (u32, u32)) -> Result<Vec<u8>, ExperimentError> {
    let mut mask = grey(path, size)?;
    if let Some(value) = mask.iter().find(|value| !matches!(value, 0 | 1 | 255)) {
        let reason = format!("holds the value {value}, but of one class a mask has 0, and 1 or 255 where the class is");
        return Err(labels_error(path, reason));
    }
    if mask.contains(&1) && mask.contains(&255) {
        // Where 1 is the class, 255 may be meant for what has no label.
        return Err(labels_error(path, "holds both 1 and 255, of which one stands for the class".to_owned()));
    }
    mask.iter_mut().for_each(|value| *value = u8::from(*value == 0));
    Ok(mask)
}

/// The values of a grey picture of that size, `[row, column]`.
fn grey(path: &Path, size: (u32, u32)) -> Result<Vec<u8>, ExperimentError> {
    let DynamicImage::ImageLuma8(picture) = images::open(path)? else {
        return Err(labels_error(path, "is no 8-bit grey image, whose values stand for classes".to_owned()));
    };
    let (width, height) = picture.dimensions();
    if (width, height) != size {
        let reason = format!("is {width} × {height} px, but its image {} × {}", size.0, size.1);
        return Err(labels_error(path, reason));
    }
    Ok(picture.into_raw())
}

/// The images of class folders, each its own group, and what lies there and is no image.
fn folder(path: &Path, card: &ModelCard) -> Result<(Vec<Item>, Vec<String>), ExperimentError> {
    let (mut items, mut others, mut names) = (Vec::new(), Vec::new(), Names::new(card));
    for entry in entries(path, 1) {
        let entry = entry?;
        if images::is_image(entry.path()) {
            return Err(labels_error(entry.path(), "lies in the folder of no class".to_owned()));
        }
        if !entry.file_type().is_dir() {
            continue;
        }
        let name = entry.file_name().to_string_lossy().into_owned();
        let class = names.class(&name).map_err(|reason| labels_error(entry.path(), reason))?;
        for file in entries(entry.path(), usize::MAX) {
            let file = file?;
            if images::is_image(file.path()) {
                items.push(Item { image: file.into_path(), truth: Truth::Class(class), group: items.len() });
            } else if !file.file_type().is_dir() {
                others.push(file.path().strip_prefix(path).unwrap_or(file.path()).display().to_string());
            }
        }
    }
    Ok((items, others))
}

/// What lies in a folder, by name; links are followed.
fn entries(folder: &Path, depth: usize) -> impl Iterator<Item = Result<walkdir::DirEntry, ExperimentError>> {
    let folder = folder.to_owned();
    let walk = WalkDir::new(&folder).follow_links(true).min_depth(1).max_depth(depth).sort_by_file_name();
    walk.into_iter().map(move |entry| {
        entry.map_err(|error| ExperimentError::File {
            path: error.path().unwrap_or(&folder).to_owned(),
            doing: "read",
            source: error.into(),
        })
    })
}

/// The items of a table, and the names of its groups. Paths are below the table's folder.
fn table(path: &Path, card: &ModelCard) -> Result<(Vec<Item>, Vec<String>), ExperimentError> {
    let unreadable = |source| ExperimentError::File { path: path.to_owned(), doing: "read", source };
    let text = std::fs::read_to_string(path).map_err(unreadable)?;
    let broken = |error: csv::Error| labels_error(path, csv_problem(&text, &error));
    let mut reader = csv::ReaderBuilder::new().trim(csv::Trim::All).from_reader(text.as_bytes());
    let headers = reader.headers().map_err(broken)?.clone();
    let column = |name: &str| headers.iter().position(|header| header.eq_ignore_ascii_case(name));
    let wanted = if card.task == Task::Segmentation { "mask" } else { "label" };
    let (Some(image), Some(truth)) = (column("image").or(column("path")), column(wanted)) else {
        let found = headers.iter().collect::<Vec<_>>().join(", ");
        return Err(labels_error(path, format!("needs the columns path and {wanted}, and has: {found}")));
    };
    let group = column("group");
    let folder = path.parent().unwrap_or(Path::new(""));
    let mut groups: BTreeMap<String, usize> = BTreeMap::new();
    let mut names = Names::new(card);
    let mut items = Vec::new();
    for record in reader.records() {
        let record = record.map_err(broken)?;
        let line = || csv_line(&text, record.position());
        let field = |index: usize| record.get(index).unwrap_or_default();
        let below = |name: &str| {
            let file = folder.join(name);
            let reason = || format!("line {}: {name:?} is no file", line());
            if file.is_file() { Ok(file) } else { Err(labels_error(path, reason())) }
        };
        let image = below(field(image))?;
        let truth = match card.task {
            Task::Segmentation if one_class::is_alone(card) => Truth::Region(below(field(truth))?),
            Task::Segmentation => Truth::Mask(below(field(truth))?),
            _ => {
                let class = names.class(field(truth));
                Truth::Class(class.map_err(|reason| labels_error(path, format!("line {}: {reason}", line())))?)
            }
        };
        if group.is_some_and(|column| field(column).is_empty()) {
            return Err(labels_error(path, format!("line {}: has no group", line())));
        }
        let next = groups.len();
        let group = group.map_or(items.len(), |group| *groups.entry(field(group).to_owned()).or_insert(next));
        items.push(Item { image, truth, group });
    }
    let mut group_names = vec![String::new(); groups.len()];
    groups.into_iter().for_each(|(name, index)| group_names[index] = name);
    Ok((items, group_names))
}

/// Which classes the names of labels stand for.
///
/// Names are the classes' own. Of a model with one class 1 is that class too, and one other name, whatever it is, stands
/// for what is not it.
struct Names<'a> {
    card: &'a ModelCard,
    /// The name of what is not the only class, once it was met.
    not: Option<String>,
}

impl<'a> Names<'a> {
    fn new(card: &'a ModelCard) -> Self {
        Self { card, not: None }
    }

    fn class(&mut self, name: &str) -> Result<usize, String> {
        let classes = &self.card.classes;
        if let Some(class) = classes.iter().position(|class| class.name == name) {
            return Ok(class);
        }
        match classes.as_slice() {
            [only] if !name.is_empty() => self.beside(&only.name, name),
            _ => {
                let known = classes.iter().map(|class| class.name.as_str()).collect::<Vec<_>>().join(", ");
                Err(format!("{name:?} is none of the model's classes: {known}"))
            }
        }
    }

    /// What a name beside that of the only class stands for.
    fn beside(&mut self, only: &str, name: &str) -> Result<usize, String> {
        // A class may itself be called 0, and then 1 is the other one.
        if name == "1" && only != "0" {
            return Ok(0);
        }
        let not = self.not.get_or_insert_with(|| name.to_owned());
        if not == name {
            return Ok(one_class::NOT);
        }
        Err(format!("{name:?} and {not:?} can't both be what is not {only:?}, the model's only class"))
    }
}

fn labels_error(path: &Path, reason: String) -> ExperimentError {
    ExperimentError::Labels { path: path.to_owned(), reason }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inference::{BareModel, Class};
    use image::{GrayImage, Luma, RgbImage};
    use std::fs;

    fn card(name: &str) -> ModelCard {
        ModelCard::load(&Path::new("models").join(name), &BareModel::default()).unwrap()
    }

    fn picture(path: &Path) {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        RgbImage::new(8, 6).save(path).unwrap();
    }

    fn reason(result: Result<Labelled, ExperimentError>) -> String {
        result.unwrap_err().to_string()
    }

    #[test]
    fn folders_are_classes() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["stroma/b.png", "stroma/a.png", "lymphocyte/c.png"] {
            picture(&folder.path().join(name));
        }
        fs::write(folder.path().join("stroma/notes.txt"), "").unwrap();
        fs::write(folder.path().join("readme.md"), "").unwrap();
        let found = read(folder.path(), &card("cells-vit")).unwrap();
        let items: Vec<_> = found.items.iter().map(|item| (item.truth.clone(), item.group)).collect();
        assert_eq!(items, [(Truth::Class(0), 0), (Truth::Class(2), 1), (Truth::Class(2), 2)]);
        assert!(found.items[1].image.ends_with("stroma/a.png") && !found.has_groups());
        assert_eq!(found.others, ["stroma/notes.txt"]);
        picture(&folder.path().join("d.png"));
        assert!(reason(read(folder.path(), &card("cells-vit"))).contains("d.png: lies in the folder of no class"));
        fs::remove_file(folder.path().join("d.png")).unwrap();
        assert!(reason(read(folder.path(), &card("cells-unet"))).contains("path,mask"));
        fs::create_dir(folder.path().join("blood")).unwrap();
        let said = reason(read(folder.path(), &card("cells-vit")));
        assert!(said.contains("\"blood\" is none of the model's classes: lymphocyte"), "{said}");
    }

    #[cfg(unix)]
    #[test]
    fn folders_that_are_links_are_classes_too() {
        let folder = tempfile::tempdir().unwrap();
        picture(&folder.path().join("elsewhere/deep/a.png"));
        fs::create_dir(folder.path().join("data")).unwrap();
        let link = folder.path().join("data/stroma");
        std::os::unix::fs::symlink(folder.path().join("elsewhere"), link).unwrap();
        let found = read(&folder.path().join("data"), &card("cells-vit")).unwrap();
        assert_eq!(found.items.iter().map(|item| item.truth.clone()).collect::<Vec<_>>(), [Truth::Class(2)]);
    }

    #[test]
    fn tables_name_images_classes_and_groups() {
        let folder = tempfile::tempdir().unwrap();
        picture(&folder.path().join("a.png"));
        let write = |text: &str| {
            let path = folder.path().join("labels.csv");
            fs::write(&path, text).unwrap();
            path
        };
        let vit = card("cells-vit");
        let found =
            read(&write("image,label,group\na.png,glass,p2\na.png, stroma,p1\na.png,stroma,p2\n"), &vit).unwrap();
        assert_eq!(found.items.iter().map(|item| item.group).collect::<Vec<_>>(), [0, 1, 0]);
        assert_eq!(
            (found.groups, found.group_names.join(" "), found.items[1].truth.clone()),
            (2, "p2 p1".to_owned(), Truth::Class(2))
        );
        for (text, expected) in [
            ("image,class\na.png,glass\n", "needs the columns path and label, and has: image, class"),
            ("image,label\na.png,glass\nb.png,glass\n", "line 3: \"b.png\" is no file"),
            ("image,label\na.png,fat\n", "line 2: \"fat\" is none"),
            ("path,label\n", "holds no labelled image"),
            ("image,label,group\na.png,glass,1\n\na.png,glass,\n", "line 4: has no group"),
            ("image,label\n\n\na.png\n", "line 4: has 1 columns, the first line 2"),
        ] {
            let said = reason(read(&write(text), &vit));
            assert!(said.contains(expected), "{said}");
        }
        let masks = read(&write("image,mask\na.png,a.png\n"), &card("cells-unet")).unwrap();
        assert!(matches!(&masks.items[0].truth, Truth::Mask(path) if path.ends_with("a.png")));
    }

    /// A card with one class, `tumour`.
    fn one(task: Task) -> ModelCard {
        let mut card = card(if task == Task::Segmentation { "cells-unet" } else { "cells-vit" });
        card.classes.truncate(1);
        card.classes[0].name = "tumour".to_owned();
        card
    }

    #[test]
    fn of_one_class_another_name_is_what_is_not_it() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["normal/a.png", "tumour/b.png"] {
            picture(&folder.path().join(name));
        }
        let model = one(Task::Classification);
        let classes = |found: &Labelled| found.items.iter().map(|item| item.truth.clone()).collect::<Vec<_>>();
        assert_eq!(classes(&read(folder.path(), &model).unwrap()), [Truth::Class(1), Truth::Class(0)]);
        fs::create_dir(folder.path().join("blood")).unwrap();
        let said = reason(read(folder.path(), &model));
        assert!(said.contains("\"normal\" and \"blood\" can't both be what is not \"tumour\""), "{said}");
        let write = |labels: &[&str]| {
            let path = folder.path().join("labels.csv");
            let rows: String = labels.iter().map(|label| format!("tumour/b.png,{label}\n")).collect();
            fs::write(&path, format!("path,label\n{rows}")).unwrap();
            path
        };
        let found = read(&write(&["0", "1", "tumour", "0"]), &model).unwrap();
        assert_eq!(classes(&found), [1, 0, 0, 1].map(Truth::Class));
        let zero = ModelCard { classes: vec![Class { name: "0".to_owned(), color: [0; 3] }], ..model.clone() };
        assert_eq!(classes(&read(&write(&["0", "1"]), &zero).unwrap()), [0, 1].map(Truth::Class));
        for (labels, expected) in [
            (&["tumour", "0", "negative"][..], "line 4: \"negative\" and \"0\" can't both be"),
            (&["tumour", "\"\""], "line 3: \"\" is none of the model's classes: tumour"),
            (&["Tumour", "Tumour"], "no image is labelled \"tumour\", the model's only class"),
        ] {
            let said = reason(read(&write(labels), &model));
            assert!(said.contains(expected), "{said}");
        }
    }

    #[test]
    fn a_mask_of_one_class_is_0_and_1_or_255() {
        let folder = tempfile::tempdir().unwrap();
        picture(&folder.path().join("a.png"));
        let mask = folder.path().join("m.png");
        let save = |values: [u8; 2]| {
            GrayImage::from_fn(8, 6, |x, _| Luma([values[usize::from(x > 0)]])).save(&mask).unwrap();
        };
        save([0, 1]);
        let table = folder.path().join("labels.csv");
        fs::write(&table, "path,mask\na.png,m.png\n").unwrap();
        let truth = read(&table, &one(Task::Segmentation)).unwrap().items[0].truth.clone();
        let pixels = || truth.pixels((8, 6), 2);
        // 0, which is first, is what is not the class.
        assert_eq!(pixels().unwrap()[..3], [1, 0, 0]);
        save([0, 255]);
        assert_eq!(pixels().unwrap()[..3], [1, 0, 0]);
        save([1, 255]);
        assert!(pixels().unwrap_err().to_string().contains("both 1 and 255"));
        save([0, 2]);
        assert!(pixels().unwrap_err().to_string().contains("holds the value 2, but of one class"));
        assert!(truth.pixels((8, 7), 2).unwrap_err().to_string().contains("8 × 6 px, but its image 8 × 7"));
    }

    #[test]
    fn masks_are_checked() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m.png");
        let save = |value: u8| GrayImage::from_pixel(8, 6, Luma([value])).save(&path).unwrap();
        save(255);
        assert_eq!(mask(&path, (8, 6), 3).unwrap(), [255; 48]);
        assert!(mask(&path, (8, 7), 3).unwrap_err().to_string().contains("8 × 6 px, but its image 8 × 7"));
        save(3);
        assert!(mask(&path, (8, 6), 3).unwrap_err().to_string().contains("the value 3"));
        picture(&path);
        assert!(mask(&path, (8, 6), 3).unwrap_err().to_string().contains("8-bit grey"));
    }
}
